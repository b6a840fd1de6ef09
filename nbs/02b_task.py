# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tasks
#
# > What belongs together: questions, prompts, the way an answer is found in a text, and the reward.

# %%
#| default_exp task

# %%
#| export
from dataclasses import dataclass, field
from stasc.core import Config, ConfigError, RewardError, unknown
from stasc.data import PRESETS
from stasc.maths import math_verify_reward
from stasc.reward import get_reward
from stasc.runner import code_reward

# %%
#| hide
from fastcore.test import test_eq, test_fail


# %% [markdown]
# A question with a yes-or-no answer wants a prompt that asks for yes or no, and a reward that is not taken in by "yes or no". A task names a prompt set and a reward that fit; the reward brings the way to find the answer in a text (`stasc.reward`, "Judging a text"). `options` are settings that suit the task, and that `configure` sets.

# %%
#| export
@dataclass(frozen=True)
class Task:
    "A kind of question."
    name: str
    what: str                                       # in words
    prompts: str                                    # prompt set
    reward: str                                     # name of the reward
    options: dict = field(default_factory=dict)     # settings that suit it

TASKS = {t.name: t for t in (
    Task("qa", "short answers, with or without a passage", "default", "in_accuracy"),
    Task("multi_hop", "short answers that take several facts, with or without passages", "multi_hop", "in_accuracy"),
    Task("yes_no", "yes or no, with or without a passage", "yes_no", "yes_no"),
    Task("multiple_choice", "the label of a choice", "multiple_choice", "multiple_choice"),
    Task("summary", "a summary in one sentence; the reward is graded", "summary", "rouge_l", dict(threshold=0.3)),
    Task("math", "a number or a short expression", "math", "math_equal", dict(max_new_tokens=512)),
    Task("code", "a Python program that has to pass tests", "code", "run_tests", dict(max_new_tokens=512)),
    Task("arithmetic", "three-digit addition, for the embedded model", "arithmetic", "in_accuracy"))}


# %%
import pandas as pd
pd.DataFrame([(t.name, t.what, t.prompts, t.reward, ", ".join(k for k, p in PRESETS.items() if p.task == t.name)) for t in TASKS.values()],
             columns=["task", "answers", "prompts", "reward", "presets"])

# %% [markdown]
# The task is `cfg.task`, or what the preset under `cfg.data` says; a local file holds short-answer questions unless it is told otherwise.

# %%
#| export
def task_of(cfg: Config) -> Task:
    "The task of a configuration."
    if cfg.task != "auto" and cfg.task not in TASKS: raise ConfigError(unknown("task", cfg.task, TASKS))
    if cfg.task != "auto": return TASKS[cfg.task]
    preset = PRESETS.get(cfg.data.partition(":")[0].partition("@")[0])
    return TASKS[preset.task if preset else "qa"]


# %%
for data in ("boolq", "gsm8k:test.jsonl", "xsum:train[:500]", "mine.jsonl"): print(f"{data:18} {task_of(Config(data=data)).name}")

# %%
test_eq([task_of(Config(data=d)).name for d in ("nq", "arithmetic", "squad@abc:5", "C:/boolq.jsonl", "hotpot_qa_context")], ["qa", "arithmetic", "qa", "qa", "multi_hop"])
test_eq(task_of(Config(data="mine.jsonl", task="math")).reward, "math_equal")
test_fail(lambda: task_of(Config(task="maths")), contains="unknown task 'maths', did you mean 'math'?")


# %% [markdown]
# ## The reward of a configuration
#
# `reward="auto"` is the task's. Two rewards are made on demand: `math_verify`, which needs a package, and `run_tests`, which runs programs that a model wrote. The latter is off until `run_code` is set, whether its name was given or came with the task.

# %%
#| export
_MADE = dict(math_verify=math_verify_reward, run_tests=code_reward)

def reward_of(cfg: Config):     # a function (prediction, references) -> float
    "The reward of a configuration."
    name = task_of(cfg).reward if cfg.reward == "auto" else cfg.reward
    if name == "run_tests" and not cfg.run_code:
        raise RewardError("reward run_tests runs programs that the model wrote, on this machine and in no sandbox: read what holds them in stasc.runner, then allow it with run_code = True (--run-code)")
    return _MADE[name]() if name in _MADE else get_reward(name)


# %%
for data in ("nq", "boolq", "xsum", "gsm8k"): print(f"{data:8} {reward_of(Config(data=data)).__name__}")
try: reward_of(Config(data="mbpp"))
except RewardError as e: print(e)

# %%
test_eq(reward_of(Config(data="mbpp", run_code=True)).__name__, "run_tests")
test_eq(reward_of(Config(data="boolq", reward="exact_match")).__name__, "exact_match")
test_eq(reward_of(Config()).__name__, "in_accuracy")
test_fail(lambda: reward_of(Config(reward="run_tests")), contains="run_code = True")
test_fail(lambda: reward_of(Config(reward="exact")), contains="unknown reward 'exact', did you mean 'exact_match'?")


# %% [markdown]
# ## A configuration for a data set
#
# `configure` starts from the defaults, adds what suits the task, and then what is asked for. With a graded reward the threshold is the main thing: an answer counts as right from there on, in the metrics and in the Non-Decreasing Filter. Improving compares rewards alone and needs none.

# %%
#| export
def configure(data: str,        # preset, part of one or file
              **options,        # of `Config`
             ) -> Config:
    "A configuration with the settings that suit the task of `data`."
    cfg = Config(data=data, **options)
    return cfg.replace(**task_of(cfg).options | options)


# %%
print(configure("xsum", variant="ENE"), configure("gsm8k", max_new_tokens=300), sep="\n")

# %%
test_eq(configure("nq"), Config(data="nq"))
test_eq(configure("xsum", threshold=0.5).threshold, 0.5)

# %%
#| hide
import nbdev; nbdev.nbdev_export()
