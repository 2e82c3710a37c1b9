"""The whole method on a laptop: an embedded 0.5M-parameter model learns to think in fewer tokens.

Command:   python scripts/train.py --config configs/tiny.py --workdir runs/tiny   (or: make demo)
Hardware:  2 CPU cores, 3 GiB of memory.
Time:      at most 5 minutes, all evaluations included.
Expected:  at least 50% fewer response tokens than the base model at plain prompts, at no loss of
           accuracy; easy problems compress more than hard ones.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    config.model.path = "tiny"
    config.model.compute_dtype = "float32"
    config.model.teacher_dtype = "float32"
    config.model.remat = "none"

    config.data.source = "tiny"
    config.prompts.template = "tiny"

    config.sampler.max_prompt_tokens = 40
    config.sampler.max_response_tokens = 160

    config.train.steps = 40
    config.train.micro_batch_size = 4
    config.teacher.every = 20

    # A model this small needs far larger steps than Qwen3.
    config.optim.lr = 1e-4
    config.optim.warmup_steps = 5
    config.optim.b2 = 0.95

    config.eval.source = "tiny"
    config.eval.samples = 1
    config.eval.every = 10
    config.eval.max_response_tokens = 160
    # At temperature 1 the errors of the model show; at 0.6 this easy task would hide them.
    config.eval.temperature = 1.0
    config.eval.top_p = 1.0
    config.eval.top_k = 0

    config.log.token_views = 32  # short responses: all of a batch, for a ranking of words
    return config
