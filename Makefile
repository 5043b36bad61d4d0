# `make run` and `make test` need only Python 3.11+ and make: each sets up .venv first, once for every change of requirements.

PYTHON ?= python3
.PHONY: run test tiny

run: .venv/.run
	@echo
	@echo "P3O trains a small help-desk assistant that is at first rude, off topic or repetitive half of the time. It prints,"
	@echo "now and then, measures on questions it was not trained on, and one answer before training and as it is now:"
	@echo "  reward           what a reward model, learned from people's choices, says of its answers: this is optimised"
	@echo "  gold             their true quality, never seen in training"
	@echo "  kl               how far it has moved from where it started, in nats an answer"
	@echo "  win_rate_vs_sft  how often the reward model prefers its answer to the one before training"
	@echo
	.venv/bin/python p3o_v2.py --overwrite

test: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

# Rebuild the embedded world: data, tokenizer, SFT policy, reward model; about ten minutes on two cores.
tiny: .venv/.run
	.venv/bin/python tiny/make.py

# torch goes first and pinned, so that no other package draws in another build of it.
.venv/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; pass it as make PYTHON=python3.12")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q $$(grep '^torch==' requirements.txt)
	.venv/bin/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/.test: .venv/.run requirements-dev.txt
	.venv/bin/pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@
