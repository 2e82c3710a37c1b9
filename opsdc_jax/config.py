"""Every default, once, with its unit and its source; and the checks of a whole configuration.

"Paper" below is OPSDC (arXiv 2603.05433). Files in configs/ change what differs and nothing else.
"""

import difflib
import math
from typing import Any

from ml_collections import ConfigDict

DIVERGENCE_NAMES = ("reverse_kl", "forward_kl", "jsd", "nll")
WEIGHT_RULES = ("tokens", "sequences", "micro_batches", "advantages")
POLICIES = ("student", "teacher")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "attention", "dots")
GUARD_ACTIONS = ("stop", "warn")
ATTENTION_NAMES = ("auto", "dense", "blockwise", "splash", "cudnn")


class InputError(ValueError):
    """Bad input from the user. The message is one sentence that says what to change."""


def default_config() -> ConfigDict:
    """The paper's settings for Qwen3-8B."""
    config = ConfigDict()
    config.seed = 0  # of prompts, rollouts and evaluation; non-negative

    config.model = ConfigDict()
    config.model.path = "Qwen/Qwen3-8B"  # Hugging Face folder; also the first teacher
    config.model.compute_dtype = "bfloat16"  # activations; the student's masters stay float32
    config.model.teacher_dtype = "bfloat16"  # the teacher's parameters
    config.model.attention = "auto"  # by device and length, see models/attention.py, or a name
    # "none", "full", "attention" or "dots": what each keeps stands in models/layers.py
    config.model.remat = "full"

    config.data = ConfigDict()
    # "tiny", a jsonl / json / parquet file or glob, a hub id[@revision], or tfds:NAME
    config.data.source = "BytedTsinghua-SIA/DAPO-Math-17k"  # paper
    config.data.split = ""  # of a published data set; empty: train
    config.data.subset = ""  # of a published data set; empty: the usual one
    config.data.problem_column = ""  # empty: found by its usual names; so the next two
    config.data.answer_column = ""
    config.data.level_column = ""

    config.prompts = ConfigDict()
    config.prompts.template = "dapo"  # wrapping of the problem, a name in opsdc_jax/prompts.py
    config.prompts.instruction = "v1"  # teacher's: v1, v2, percent20/50/80, none, or a sentence
    config.prompts.student_thinking = True  # Qwen3's thinking mode, by side
    config.prompts.teacher_thinking = True
    config.prompts.allow_different_thinking = False  # accept prompts that end differently

    config.sampler = ConfigDict()
    config.sampler.max_prompt_tokens = 1024  # tokens of either side's prompt; paper
    config.sampler.max_response_tokens = 8192  # tokens of a training rollout; paper
    config.sampler.temperature = 1.0  # paper
    config.sampler.top_p = 1.0  # paper
    config.sampler.top_k = 0  # 0 = off; paper
    # Who samples the training rollouts: "student" (paper), or the "teacher" at its own prompt
    config.sampler.policy = "student"
    # Rows that decode at a time, which bounds the KV cache; when a response ends, its row takes the
    # next prompt. Changes no result. 0: the whole batch, until its longest response ends
    config.sampler.slots = 0

    config.train = ConfigDict()
    config.train.steps = 100  # the paper reports step 99-100
    config.train.batch_size = 32  # prompts a step, one response each; paper
    # Rows in memory at a time; changes no result, but with loss.weights="micro_batches"
    config.train.micro_batch_size = 4

    config.teacher = ConfigDict()
    config.teacher.every = 50  # M: steps between refreshes of the teacher, 0 = frozen; paper
    # At a refresh teacher := decay * teacher + (1 - decay) * student; 0 copies (paper). With
    # every=1 the teacher is an exponential moving average
    config.teacher.decay = 0.0

    config.loss = ConfigDict()
    # or "forward_kl", "jsd", or for the baselines "nll", -log q of the sampled token; paper:
    # reverse_kl
    config.loss.divergence = "reverse_kl"
    # "tokens": mean over the response tokens of the step (paper); "sequences": mean of the
    # responses' means; "micro_batches": mean of the micro-batches' means, as the reference code
    # gives it, which depends on train.micro_batch_size; "advantages": the policy gradient, with
    # nll: each response by its reward against the step's, in standard deviations
    config.loss.weights = "tokens"
    config.loss.only_correct = False  # only responses whose answer is right take part; paper: all
    # Of "advantages": a right answer's reward is 1 - penalty * tokens / max_response_tokens
    config.loss.length_penalty = 0.0
    # Reverse KL over the student's so many likeliest tokens, and all others as one; 0: the full one
    # (paper)
    config.loss.top_k = 0
    # Times the reverse KL from the student to the base model at the plain prompt, added to the loss
    config.loss.anchor = 0.0  # paper: none
    config.loss.chunk_tokens = 512  # response tokens whose logits exist at a time

    config.optim = ConfigDict()  # AdamW
    config.optim.lr = 1e-6  # constant after warm-up; paper
    config.optim.warmup_steps = 0  # linear; paper: none
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.01  # paper
    config.optim.clip_norm = 1.0  # global gradient norm; paper
    config.optim.offload = False  # keep AdamW's moments in the host's pinned memory between updates

    config.mesh = ConfigDict()  # devices on each axis; one may be -1, the rest
    config.mesh.replica = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1
    # Devices each layer is split over while sampling, a multiple of tensor; beyond the key/value
    # heads, keys and values are held more than once. -1: the most up to these heads
    config.mesh.decode_tensor = -1

    config.eval = ConfigDict()
    # Benchmarks, separated by commas: names in opsdc_jax/benchmarks.py (math500, aime24, aime25,
    # gsm8k, mmlu, tiny) or tables as in data.source; "none": no evaluation
    config.eval.source = "math500"  # paper
    config.eval.split = ""  # of one table; empty: test, or where it has its problems
    config.eval.subset = ""
    config.eval.problem_column = ""  # as in data
    config.eval.answer_column = ""
    config.eval.level_column = ""
    config.eval.limit = 0  # problems of each benchmark, drawn at random; 0 = all
    config.eval.samples = 8  # responses to each problem; paper
    # Folder of another run, whose responses of the base model are taken over where they were
    # sampled in the same way by the same code; empty: all are sampled, but for what train.py's
    # --new_if_finished says
    config.eval.reuse = ""
    config.eval.every = 0  # steps between evaluations of the student; 0 = only before and after
    config.eval.samples_per_level = 512  # fresh problems of each difficulty level (tiny)
    config.eval.batch_size = 32  # rows that decode at a time, as sampler.slots
    config.eval.max_response_tokens = 30_000  # paper
    config.eval.temperature = 0.6  # paper
    config.eval.top_p = 0.95  # paper
    config.eval.top_k = 20  # paper

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 10  # 0 = only at the end and before evaluations
    config.checkpoint.every_minutes = 0.0  # also after so long without one; 0 = off
    # Newest ones kept, besides that of the best student evaluated; 1 leaves none to fall back to
    config.checkpoint.keep = 2

    config.guards = ConfigDict()  # margins over healthy runs: docs/reliability.md
    config.guards.action = "stop"  # or "warn", once for each trouble that begins
    config.guards.nonfinite_steps = 3  # in a row that were skipped: loss or gradient not finite
    # Steps whose median is compared with earlier ones' of the run: one odd batch is no trouble
    config.guards.window = 3
    config.guards.rise = 2.0  # times the run's own, of length and entropy: training lowers both
    config.guards.fall = 0.1  # of the run's start, of length and entropy: far under healthy runs'
    # Of a step's rollouts, over the run's own: truncated, or in loops. 30% of 32 are 30% +- 8%
    config.guards.share_rise = 0.4
    config.guards.gap = 0.1  # nats a token, |sampler's - trainer's log-prob|: far over bf16's error

    config.log = ConfigDict()
    config.log.samples_every = 10  # steps between rollouts written to samples/; 0 = first and last
    config.log.samples = 4  # rollouts written each time
    config.log.token_views = 4  # rollouts compared with the teacher, token by token; 0 = off
    config.log.tensorboard = False  # metrics.jsonl also as event files in tensorboard/
    config.log.wandb = False  # metrics.jsonl also to Weights & Biases
    return config


_AT_LEAST_ONE = (
    "sampler.max_prompt_tokens",
    "sampler.max_response_tokens",
    "train.steps",
    "train.batch_size",
    "train.micro_batch_size",
    "loss.chunk_tokens",
    "optim.clip_norm",
    "eval.samples",
    "eval.samples_per_level",
    "eval.batch_size",
    "eval.max_response_tokens",
    "checkpoint.keep",
    "guards.nonfinite_steps",
    "guards.window",
    "guards.gap",
)
_NOT_NEGATIVE = (
    "seed",
    "sampler.temperature",
    "sampler.top_k",
    "sampler.slots",
    "teacher.every",
    "loss.top_k",
    "loss.anchor",
    "optim.lr",
    "optim.warmup_steps",
    "optim.weight_decay",
    "eval.every",
    "eval.limit",
    "eval.temperature",
    "eval.top_k",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "log.samples_every",
    "log.samples",
    "log.token_views",
)
# Beyond these a run would end in memory or in years, not in an error.
_AT_MOST_A_MILLION = (
    "train.batch_size",
    "eval.batch_size",
    "eval.samples",
    "eval.samples_per_level",
)
_LARGEST = 2**31 - 1  # of every whole number: what counts on a device is int32
_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
_CHOICES = {
    "model.compute_dtype": DTYPES,
    "model.teacher_dtype": DTYPES,
    "model.attention": ATTENTION_NAMES,
    "model.remat": REMAT_POLICIES,
    "loss.divergence": DIVERGENCE_NAMES,
    "loss.weights": WEIGHT_RULES,
    "sampler.policy": POLICIES,
    "guards.action": GUARD_ACTIONS,
}


def validate(config: ConfigDict) -> None:
    """Checks every value that can be checked without touching a device or a file.

    Raises:
      InputError: naming the key, its value and what would be right.
    """
    known, given = flatten(default_config()), flatten(config)
    for key in given.keys() - known.keys():
        raise InputError(unknown_key(key))
    for key in known.keys() - given.keys():
        raise InputError(f"config.{key} is missing: start from default_config()")
    for key, value in given.items():
        check_kind(key, value, type(known[key]))
    for key in _AT_LEAST_ONE:
        _require(config, key, lambda value: value > 0, "must be positive")
    for key in _NOT_NEGATIVE:
        _require(config, key, lambda value: value >= 0, "must not be negative")
    for key, names in _CHOICES.items():
        _require(config, key, lambda value, names=names: value in names, f"is not one of {names}")
    for key in _AT_MOST_A_MILLION:
        _require(config, key, lambda value: value <= 10**6, "must be at most 1,000,000")
    for key in ("sampler.top_p", "eval.top_p"):
        _require(config, key, lambda value: 0 < value <= 1, "must be above 0 and at most 1")
    key = "loss.length_penalty"
    _require(config, key, lambda value: 0 <= value <= 1, "must be at least 0 and at most 1")
    for key in ("optim.b1", "optim.b2", "teacher.decay"):
        _require(config, key, lambda value: 0 <= value < 1, "must be in [0, 1)")
    _require(config, "guards.rise", lambda value: value > 1, "must be above 1")
    for key in ("guards.fall", "guards.share_rise"):
        _require(config, key, lambda value: 0 < value < 1, "must be between 0 and 1")
    if config.eval.samples > 1 and config.eval.temperature == 0:
        raise InputError(
            f"eval.samples={config.eval.samples} at eval.temperature=0 would all be the same: take "
            "one sample, or another temperature"
        )
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch % micro:
        raise InputError(
            f"train.batch_size={batch} is not a multiple of train.micro_batch_size={micro}: "
            f"choose a micro_batch_size that divides it"
        )
    _refuse_contradictions(config)


def _refuse_contradictions(config: ConfigDict) -> None:
    """Raises InputError where the keys of teacher and loss do not go together."""
    loss, teacher = config.loss, config.teacher
    if teacher.decay and not teacher.every:
        raise InputError(
            f"teacher.decay={teacher.decay} with teacher.every=0 is a teacher that never changes: "
            "set teacher.every, or teacher.decay=0"
        )
    if teacher.decay and config.model.teacher_dtype != "float32":
        raise InputError(
            f"teacher.decay={teacher.decay} moves the teacher by less than "
            f"{config.model.teacher_dtype} can hold: set model.teacher_dtype='float32'"
        )
    if loss.top_k and loss.divergence != "reverse_kl":
        raise InputError(
            f"loss.top_k={loss.top_k} is of the reverse KL alone: set loss.divergence="
            "'reverse_kl', or loss.top_k=0"
        )
    policy_gradient = loss.weights == "advantages"
    if policy_gradient and (loss.divergence != "nll" or config.sampler.policy != "student"):
        raise InputError(
            "loss.weights='advantages' is the policy gradient on the student's own responses: set "
            "loss.divergence='nll' and sampler.policy='student'"
        )
    if policy_gradient and loss.only_correct:
        raise InputError(
            "loss.weights='advantages' learns from wrong answers too: set loss.only_correct=False"
        )
    if policy_gradient and config.train.batch_size == 1:
        raise InputError(
            "loss.weights='advantages' compares the responses of a step: raise train.batch_size"
        )
    if loss.length_penalty and not policy_gradient:
        raise InputError(
            f"loss.length_penalty={loss.length_penalty} is of the policy gradient alone: set "
            "loss.weights='advantages', or loss.length_penalty=0"
        )
    own = config.sampler.policy == "student" and not loss.only_correct
    if loss.divergence == "nll" and own and not policy_gradient:
        raise InputError(
            "loss.divergence='nll' on the student's own responses, right or wrong, teaches "
            "nothing: set sampler.policy='teacher', loss.only_correct=True or "
            "loss.weights='advantages'"
        )


def check_kind(key: str, value: Any, kind: type) -> None:
    """Refuses what is not of the default's type, and numbers that cannot be computed with."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind is not bool and isinstance(value, bool):  # which Python counts among the integers
        fits = False
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{key}={value!r} must be {_KINDS[kind]}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise InputError(f"{key}={value} must be at most {_LARGEST}")


def _require(config: ConfigDict, key: str, holds: Any, message: str) -> None:
    value = get(config, key)
    if not holds(value):
        raise InputError(f"{key}={value!r} {message}")


def unknown_key(key: str) -> str:
    """What to tell about a key that does not exist."""
    nearest = difflib.get_close_matches(key, flatten(default_config()), n=1, cutoff=0)
    return f"unknown key config.{key}: did you mean config.{nearest[0]}?"


def get(config: ConfigDict, key: str) -> Any:
    """Value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted keys -> values, sorted."""
    flat: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """`key: theirs -> ours` for every dotted key on which two flat configurations differ."""
    missing = "(absent)"
    return [
        f"{key}: {theirs.get(key, missing)!r} -> {ours.get(key, missing)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, missing) != theirs.get(key, missing)
    ]
