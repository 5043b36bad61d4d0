"""Two processes take the steps of one, only the first writes, and a killed job goes on."""

import signal

import pytest
import torch
from conftest import EVALUATIONS, EVERY, OFFLINE, ONLINE, SCORED, ending, save
from scripts import KILL, TINY, assert_same, ended, lines, run, run_two, start_two
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpo

MOMENT = (KILL, "os.rename", "checkpoint-000002.part")
OF_A_PART = r"val/.*|policy/(ratio_max|.*_std)|value/explained.*"  # averages of both processes


def assert_near(found, expected):
    """Rounding grows with the steps."""
    assert_same(found[:1], expected[:1], OF_A_PART, rel=1e-3, abs=1e-4)
    assert_same(found[1:], expected[1:], OF_A_PART, rel=1e-2, abs=2e-3)


@pytest.mark.parametrize("script", EVERY)
def test_two_processes_take_the_steps_of_one(script, flags, finished, tmp_path):
    """Of online scripts one update, of two steps: later, rounding may lead to another sample."""
    options = flags[script]
    if script in ONLINE:  # a minibatch of all prompts, which is the same in two processes
        options = [*options, "--minibatch-size", 4, "--num-updates", 1]
        run(script, *options, "--output-dir", "one", cwd=tmp_path)
    if script == "mpo":  # go on from one, with the samples of the reference that it has drawn
        run(script, *options, cwd=tmp_path, disturb=MOMENT, code=-signal.SIGKILL)
        options = [*options, "--resume"]
    one = tmp_path / "one" if script in ONLINE else finished(script)
    [_, said] = run_two(script, *options, cwd=tmp_path)
    assert said == ""
    assert len(list(tmp_path.glob("run/events.out.tfevents.*"))) == 1 + (script == "mpo")

    def logged(name):
        return [lines(folder / f"{name}.jsonl") for folder in (tmp_path / "run", one)]

    assert_near(*logged("metrics"))
    found, expected = logged(EVALUATIONS[script])
    if script not in OFFLINE:
        assert_near(found, expected)
    else:  # each process draws alike, so the policy answers otherwise than in one
        assert (found[0]["kl"], found[0]["accuracy"]) == (0, 0.5)
    if script in SCORED:
        rows = [[(row["step"], row["prompt"]) for row in part] for part in logged("samples")]
        assert sorted(rows[0]) == sorted(rows[1])


def test_samples_of_the_reference_are_answers_to_their_prompts(flags, finished, data, tmp_path):
    """In one process and, of uneven shares, in two: most likely after the prompt they belong to."""
    run_two("mpo", *flags["mpo"], "--ref-samples-per-prompt", 2, "--num-updates", 1, cwd=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    reference = AutoModelForCausalLM.from_pretrained(TINY / "sft")
    args = mpo.Args(dataset=str(data), max_response_tokens=16)
    _, examples, _ = mpo.load_examples(tokenizer, [0], 99, ("prompt", "chosen", "rejected"), args)
    examples.sort(key=lambda example: len(example[0]))
    for folder, n in ((finished("mpo"), 1), (tmp_path / "run", 2)):
        ref_logps, samples = torch.load(folder / "reference.pt")
        assert len(ref_logps) == len(examples) == 21 and len(samples) == 21 * n
        groups = [[torch.tensor(y) for y in samples[n * i : n * i + n]] for i in range(21)]
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
    save(model, tmp_path / "policy")
    options = [*flags["mpo"], "--model", tmp_path / "policy", "--num-updates", 1]
    run_two("mpo", *options, "--output-dir", "run", cwd=tmp_path)
    _, samples = torch.load(tmp_path / "run/reference.pt")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    first = [tokenizer.decode(y[:1]) for y in samples]
    one, other = first[::2], first[1::2]  # the two processes take turns
    assert one[:4] != other[:4]
    answers = [row["sft_response"] for row in lines(tmp_path / "run/samples.jsonl")]
    assert not all(answer.startswith(text) for answer, text in zip(answers[:2], one))


@pytest.mark.parametrize("script", ["p3o_v2", "dpo"])
def test_a_job_of_two_that_was_killed_goes_on_as_if_nothing_had_been(script, flags, tmp_path):
    first, second = start_two(script, *flags[script], cwd=tmp_path, disturb=MOMENT)
    ended(first, -signal.SIGKILL)
    assert second.wait()[0] != 0  # it does not wait for the first forever
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "run/model").exists()
    run_two(script, *flags[script], "--resume", cwd=tmp_path)
    run_two(script, *flags[script], "--output-dir", "undisturbed", cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(tmp_path / "undisturbed")
