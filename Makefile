# `make run` and `make test` need only Python 3.11+ and make: each sets up .venv first, once for every change of requirements.

PYTHON ?= python3
.PHONY: install run test tiny

run: .venv/.run
	@echo
	@echo "P3O trains a small help-desk assistant that is often rude, off topic or repetitive at first. Each evaluation"
	@echo "prints means over held-out prompts, and one response next to the one before training:"
	@echo "  reward           score of a reward model trained on noisy synthetic preferences: this is optimised"
	@echo "  gold             true reward, never used in training"
	@echo "  kl               how far the policy has moved from the SFT policy, in nats per response"
	@echo "  win_rate_vs_sft  how often the reward model prefers the response to the SFT policy's"
	@echo
	.venv/bin/python p3o_v2.py --overwrite

install: .venv/.run

test: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

# Rebuild the built-in world: data, tokenizer, SFT policy, reward model; about ten minutes on two cores.
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
