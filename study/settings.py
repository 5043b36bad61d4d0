"""Settings of the study: which script runs with which flags, as data. study/run.py runs them.

A part is a list of runs, and a run is a dict of flags, with the script among them. All runs are on
the built-in world and are evaluated on the same 256 held-out prompts.
"""

from itertools import product

FOLDER = "runs/study_data"  # data and models of the parts labels, rewards and scale
KLS = (1.0, 2.0, 4.0)  # at which reward is compared, nats per response

# ---------------------------------------------------------------------- the scripts' default budget
# 60 updates of 32 prompts with 4 responses. An evaluation every 4 updates, for a fine frontier.
ONLINE_FLAGS = {"eval_every": 4, "save_every": 0}
OFFLINE_FLAGS = {"eval_every": 25, "save_every": 0}
# A search on seed 1 goes over the script's own values on tiny times these
LEARNING_RATE_FACTORS = (0.5, 1, 2)
BETA_FACTORS = (0.25, 1, 4)
SEARCH_SEED = 1
SEEDS = (2, 3, 4, 5, 6)  # for the settings found; a script of one's own runs on the first three
OWN = {  # learning rate and β that the scripts have on tiny by default
    "p3o_v2": (2e-4, 0.2),
    "p3o_v1": (2e-4, 0.2),
    "rloo": (2e-4, 0.2),
    "grpo": (5e-5, 0.04),
    "ppo": (2e-4, 0.2),
    "online_dpo": (1e-4, 0.4),
}
FOUND = {**OWN, "ppo": (1e-4, 0.2), "online_dpo": (5e-5, 0.4)}  # tests/test_study.py compares


def around(learning_rate, beta):
    """Learning rates and β of the search; without β (None or 0), learning rates alone."""
    betas = [float(f"{beta * x:.3g}") for x in BETA_FACTORS] if beta else [beta]
    rates = [float(f"{learning_rate * x:.3g}") for x in LEARNING_RATE_FACTORS]
    return list(product(rates, betas))


def run(script, learning_rate, beta, seed, **flags):
    """The flags of a run. ipo.py has τ in the place of β."""
    strength = {} if beta is None else {"tau" if script == "ipo" else "beta": beta}
    return {"script": script, **flags, "learning_rate": learning_rate, **strength, "seed": seed}


def search():
    """Learning rate and β of six online algorithms at the default budget, one seed"""
    return [
        run(script, *pair, SEARCH_SEED, **ONLINE_FLAGS)
        for script in OWN
        for pair in around(*OWN[script])
    ]


def budget():
    """The best setting of each of the six, five fresh seeds"""
    return [run(script, *FOUND[script], seed, **ONLINE_FLAGS) for seed in SEEDS for script in FOUND]


def translation():
    """The same with δ(x) ~ N(0, 10²) added to all rewards of a prompt x, three seeds"""
    flags = {**ONLINE_FLAGS, "reward_fn": "study/rewards.py:shift_10"}
    return [run(script, *FOUND[script], seed, **flags) for seed in SEEDS[:3] for script in FOUND]


def epochs():
    """P3O-V2 and RLOO further off-policy: 1 or 8 epochs, or twice the learning rate"""
    runs = []
    for seed, script in product(SEEDS, ("p3o_v2", "rloo")):
        rate, beta = FOUND["p3o_v2"]
        for number in (1, 8):
            runs.append(run(script, rate, beta, seed, **ONLINE_FLAGS, num_epochs=number))
        runs.append(run(script, 2 * rate, beta, seed, **ONLINE_FLAGS))
        if FOUND[script] != (rate, beta):  # else part budget has it
            runs.append(run(script, rate, beta, seed, **ONLINE_FLAGS))
    return runs


# ------------------------------------------------------------------------- a small, equal budget
# 320 optimizer steps of 16 pairs. Online: 20 updates of 64 prompts with 2 responses, 4 epochs.
# Offline: 5,120 labelled pairs, once. Made with earlier versions of the scripts.
SMALL_ONLINE = {
    "num_updates": 20,
    "eval_every": 4,
    "save_every": 0,
    "num_responses": 2,
    "prompts_per_update": 64,
    "minibatch_size": 16,
}
SMALL_OFFLINE = {
    "num_updates": 320,
    "minibatch_size": 16,
    "eval_every": 64,
    "save_every": 0,
    "lr_schedule": "constant",
}
SMALL = dict.fromkeys(("p3o_v1", "p3o_v2", "ppo", "online_dpo"), SMALL_ONLINE)
SMALL |= dict.fromkeys(("dpo", "ipo", "mpo"), SMALL_OFFLINE)
SMALL_BEST = {  # the best two cells of the grid: learning rate, β or τ
    "p3o_v1": ((2e-4, 0.2), (4e-4, 0.2)),
    "p3o_v2": ((4e-4, 0.2), (2e-4, 0.05)),
    "ppo": ((2e-4, 0.2), (1e-4, 0.2)),
    "online_dpo": ((4e-4, 0.8), (2e-4, 0.8)),
    "dpo": ((2e-4, 0.8), (4e-4, 0.8)),
    "ipo": ((1e-4, 0.05), (2e-4, 0.05)),
    "mpo": ((2e-4, 0.05), (4e-4, 0.2)),
}


def grid():
    """Learning rate and β of seven algorithms at a small budget, one seed"""
    pairs = product((1e-4, 2e-4, 4e-4), (0.05, 0.2, 0.8))
    return [run(script, *pair, 1, **SMALL[script]) for script, pair in product(SMALL, pairs)]


def seeds():
    """The best two settings of each of the seven, five fresh seeds, twice the evaluations"""
    runs = []
    for seed, script in product(SEEDS, SMALL):
        flags = {**SMALL[script], "eval_every": SMALL[script]["eval_every"] // 2}
        runs += [run(script, *pair, seed, **flags) for pair in SMALL_BEST[script]]
    return runs


def clipping():
    """ε of P3O-V1 and P3O-V2 at two learning rates, two seeds"""
    runs = product(SEEDS[:2], (0.0, 0.1, 0.2, 0.5), (2e-4, 4e-4), ("p3o_v1", "p3o_v2"))
    return [
        run(script, rate, 0.2, seed, **SMALL_ONLINE, clip_range=clip)
        for seed, clip, rate, script in runs
    ]


def responses():
    """K responses of P3O-V2 to a prompt at about the same number of samples, five seeds"""
    runs = []
    for seed, (k, prompts, minibatch) in product(
        SEEDS, ((2, 64, 16), (3, 42, 14), (4, 32, 8), (8, 16, 4))
    ):
        sizes = {"num_responses": k, "prompts_per_update": prompts, "minibatch_size": minibatch}
        runs.append(run("p3o_v2", *SMALL_BEST["p3o_v2"][0], seed, **{**SMALL_ONLINE, **sizes}))
    return runs


def labels():
    """Four epochs of the same 1,600 pairs offline, with right labels or 30 % flipped, two seeds"""
    flags = {**SMALL_OFFLINE, "num_updates": 400, "data_epochs": 4, "eval_every": 100}
    flags |= {"model": "tiny", "reward_model": "tiny/reward_model"}
    flags |= {"gold_fn": "tiny/gold.py:gold_reward"}
    runs = []
    for seed, script, flipped in product(SEEDS[:2], ("dpo", "ipo", "mpo"), (0, 30)):
        for pair in (SMALL_BEST[script][0], (2e-4, 0.1)):  # the second is a usual one
            dataset = f"{FOLDER}/gold_flipped_{flipped}"
            runs.append(run(script, *pair, seed, dataset=dataset, **flags))
    return runs


def rewards():
    """Reward models of 10, 30 and 100 % of the pairs, and with 30 % flipped labels, three seeds"""
    runs = product(SEEDS[:3], REWARD_MODELS, ("p3o_v2", "ppo", "online_dpo"))
    return [
        run(
            script,
            *SMALL_BEST[script][0],
            seed,
            **SMALL_ONLINE,
            reward_model=f"{FOLDER}/{name}/model",
        )
        for seed, name, script in runs
    ]


def scale():
    """Policies of 0.1, 0.5 and 1.1 million parameters, two seeds"""
    flags = {**SMALL_ONLINE, "dataset": "tiny", "reward_model": "tiny/reward_model"}
    small, large = (f"{FOLDER}/{name}/model" for name in POLICIES)
    pair = SMALL_BEST["p3o_v2"][0]
    return [
        run("p3o_v2", *pair, seed, model=model, **flags)
        for seed, model in product(SEEDS[:2], (small, "tiny/sft", large))
    ]


# What the last three parts need: study/models.py makes it.
PAIRS = {  # the first n of tiny's training pairs, labelled by gold or not, per cent flipped
    "gold_flipped_0": (1600, True, 0),
    "gold_flipped_30": (1600, True, 30),
    "pairs_1200": (1200, False, 0),
    "pairs_3600": (3600, False, 0),
    "pairs_12000": (12000, False, 0),
    "pairs_12000_flipped_30": (12000, False, 30),
}
REWARD_MODELS = {f"reward_{name}": name for name in PAIRS if name.startswith("pairs")}
SIZES = {"init_100k": (48, 2, 2), "init_1200k": (144, 4, 6)}  # width, layers, heads; tiny: 96, 4, 4
POLICIES = {name.replace("init", "policy"): name for name in SIZES}

PARTS = {
    part.__name__: part
    for part in (search, budget, translation, epochs)
    + (grid, seeds, clipping, responses, labels, rewards, scale)
}
