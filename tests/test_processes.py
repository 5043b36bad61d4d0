"""Two processes, joined by gloo: they take the steps of one, only the first writes, and a job that
was killed goes on as if nothing had been."""

import re
import signal

import pytest
import torch
from conftest import (
    EVALUATIONS,
    EVERY,
    KILL,
    OFFLINE,
    ONLINE,
    STAGES,
    TINY,
    Script,
    ending,
    lines,
    run,
    run_two,
    start_two,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpo

MOMENT = (KILL, "os.rename", "checkpoint-000002.part")
# A number of each process, averaged
OF_A_PART = r"time/.*|val/.*|policy/(ratio_max|.*_std)|value/explained.*"


def assert_same(found, expected, left_out=()):
    """Rows of logs are equal but for rounding, which grows with the steps."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for number, (row, other) in enumerate(zip(found, expected)):
        near = {"rel": 1e-2, "abs": 2e-3} if number else {"rel": 1e-3, "abs": 1e-4}
        for key in row:
            if not re.fullmatch(OF_A_PART, key) and key not in left_out:
                assert row[key] == pytest.approx(other[key], **near), key


@pytest.mark.parametrize("script", EVERY)
def test_two_processes_take_the_steps_of_one(script, flags, finished, tmp_path):
    """Of online scripts one update, of two steps: later, rounding may lead to another sample."""
    options, updates = flags[script], 3
    if script in ONLINE:  # a minibatch of all prompts, which is the same in two processes
        options, updates = [*options, "--minibatch-size", 4, "--num-updates", 1], 1
        run(script, *options, "--output-dir", "one", cwd=tmp_path)
    one = tmp_path / "one" if script in ONLINE else finished(script)
    [_, said] = run_two(script, *options, cwd=tmp_path)
    assert said == ""
    assert len(list(tmp_path.glob("run/events.out.tfevents.*"))) == 1

    def logged(name):
        return [lines(folder / f"{name}.jsonl") for folder in (tmp_path / "run", one)]

    found, expected = logged("metrics")
    assert len(found) == updates
    if script == "mpo":  # the samples of the reference are others
        of_samples = ("policy/loss", "policy/ref_sample_logps", "grad_norm")
        assert_same(found[:1], expected[:1], of_samples)
    else:
        assert_same(found, expected)
    found, expected = logged(EVALUATIONS[script])
    if script not in OFFLINE:
        assert_same(found, expected)
    else:  # each process draws alike, so the policy answers otherwise than in one
        assert (found[0]["kl"], found[0]["accuracy"]) == (0, 0.5)
    if script not in STAGES:
        found, expected = (
            sorted((row["step"], row["prompt"]) for row in rows) for rows in logged("samples")
        )
        assert found == expected


def test_two_processes_of_mpo_take_the_steps_of_one_with_its_samples(flags, finished, tmp_path):
    code, said = Script("mpo", *flags["mpo"], cwd=tmp_path, disturb=MOMENT).wait()
    assert code == -signal.SIGKILL, said
    run_two("mpo", *flags["mpo"], "--resume", cwd=tmp_path)
    assert_same(lines(tmp_path / "run/metrics.jsonl"), lines(finished("mpo") / "metrics.jsonl"))


def test_samples_of_the_reference_are_answers_to_their_prompts(flags, finished, data, tmp_path):
    """In one process and, of uneven shares, in two: most likely after the prompt they belong to."""
    run_two("mpo", *flags["mpo"], "--ref-samples-per-prompt", 2, "--num-updates", 1, cwd=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    reference = AutoModelForCausalLM.from_pretrained(TINY / "sft")
    args = mpo.Args(dataset=str(data), max_response_tokens=16)
    _, examples, _ = mpo.load_examples(tokenizer, [0], 99, ("chosen", "rejected"), args)
    examples.sort(key=lambda example: len(example[0]))
    for folder, n in ((finished("mpo"), 1), (tmp_path / "run", 2)):
        ref_logps, samples = torch.load(folder / "reference.pt")
        assert len(ref_logps) == len(examples) == 21 and len(samples) == 21 * n
        samples = [torch.tensor(y) for y in samples]
        groups = [samples[n * i : n * i + n] for i in range(21)]
        prompts, pairs = zip(*examples)
        with torch.no_grad():
            expected = mpo.response_logps(reference, prompts, pairs, 1.0)
            own = mpo.response_logps(reference, prompts, groups, 1.0).sum(1)
            rolled = mpo.response_logps(reference, prompts, groups[1:] + groups[:1], 1.0).sum(1)
        torch.testing.assert_close(ref_logps, expected, rtol=1e-5, atol=1e-4)
        assert (own > rolled).double().mean() > 0.8


def test_samples_of_the_reference_are_not_those_of_evaluations_or_of_each_other(flags, tmp_path):
    """With all logits 0 random numbers alone decide what is sampled."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "sft")
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    tokenizer.save_pretrained(tmp_path / "policy")
    options = [*flags["mpo"], "--model", tmp_path / "policy", "--num-updates", 1]
    run_two("mpo", *options, "--output-dir", "run", cwd=tmp_path)
    _, samples = torch.load(tmp_path / "run/reference.pt")
    first = [tokenizer.decode(y[:1]) for y in samples]  # of 11 rows and of 10
    assert first[:4] != first[11:15]
    answers = [row["sft_response"] for row in lines(tmp_path / "run/samples.jsonl")]
    assert not all(answer.startswith(text) for answer, text in zip(answers[:2], first))


@pytest.mark.parametrize("script", ["p3o_v2", "dpo"])
def test_a_job_of_two_that_was_killed_goes_on_as_if_nothing_had_been(script, flags, tmp_path):
    first, second = start_two(script, *flags[script], cwd=tmp_path, disturb=MOMENT)
    code, said = first.wait()
    assert code == -signal.SIGKILL, said
    code, said = second.wait()
    assert code != 0, said  # it does not wait for the first forever
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run/model").exists()
    run_two(script, *flags[script], "--resume", cwd=tmp_path)
    run_two(script, *flags[script], "--output-dir", "undisturbed", cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(tmp_path / "undisturbed")
