"""Compares a model, the same model under the concise prompt, and a trained one, on benchmarks.

    python scripts/evaluate.py --model Qwen/Qwen3-8B --compare my-model --benchmark math500,aime24
        --samples 8 --budget 30000 --out results
    python scripts/evaluate.py --model tiny --benchmark tiny --limit 60 --budget 160 --out results
    python scripts/evaluate.py --regrade results

All systems answer the same problems with the same sampling settings, budget and random numbers:
--model is the base, asked plainly and under --instruction; --compare is the trained model
(scripts/export.py writes it), asked plainly. A benchmark is math500, aime24, aime25, gsm8k, mmlu
(the STEM subjects), tiny, a hub id, or a file; several are separated by commas. Defaults are those
of opsdc_jax/config.py. Everything sampled is kept in --out (docs/formats.md). Killed, it goes on
where it was when it is started again with the same settings, and ends with the same result, unless
two candidates for a token are equal to within rounding.
--regrade grades the responses of such a folder, of a run, or of one file again, without a model.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opsdc_jax import cli, config, report, results, rollout, sharding, summary
from opsdc_jax.benchmarks import Benchmark, open_benchmarks
from opsdc_jax.config import InputError, default_config
from opsdc_jax.data import Example
from opsdc_jax.evaluate import Evaluator, System
from opsdc_jax.files import fingerprint, write_json
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.prompts import Prompts
from opsdc_jax.sampler import Sampler, decode_mesh
from opsdc_jax.tiny import BASE_FOLDERS

# Flag -> the key of the configuration that holds its default and its limits, and its help.
_FLAGS = {
    "benchmark": ("eval.source", "names, files or hub ids, separated by commas"),
    "samples": ("eval.samples", "responses to each problem"),
    "budget": ("eval.max_response_tokens", "tokens of a response, at most"),
    "instruction": ("prompts.instruction", "of the concise prompt: a name or a sentence"),
    "template": ("prompts.template", "wrapping of the problem; of the tiny model: tiny"),
    "temperature": ("eval.temperature", "0 is greedy"),
    "top_p": ("eval.top_p", "in (0, 1]"),
    "top_k": ("eval.top_k", "0 keeps all"),
    "seed": ("seed", "of the sampling"),
    "limit": ("eval.limit", "problems of each benchmark, drawn at random; 0: all"),
    "samples_per_level": ("eval.samples_per_level", "problems of each level of tiny"),
    "max_prompt_tokens": ("sampler.max_prompt_tokens", "longer problems are left out"),
    "batch_size": ("eval.batch_size", "rows that decode at a time"),
    "dtype": ("model.compute_dtype", "of weights and activations; of the tiny model: float32"),
    "tensor": ("mesh.tensor", "devices that share each matrix; batches go over the rest"),
}


class Model(NamedTuple):
    """A model whose files are checked and whose weights are not read yet.

    Attributes:
      path: as the user gave it.
      weights: digest of the weights.
    """

    path: str
    folder: pathlib.Path
    weights: str
    config: Qwen3Config
    tokenizer: Any
    prompts: Prompts


def main(argv: Sequence[str]) -> int:
    """Samples, grades and summarises; or grades again and summarises."""
    args = parse(argv)
    if args.regrade:
        return regrade(pathlib.Path(args.regrade))
    settings, out = settings_of(args), pathlib.Path(args.out)
    if (out / "config.json").exists():
        raise InputError(f"--out={out} is the folder of a training run: choose another")
    base = open_model(settings, args.model)
    benchmarks = open_problems(settings, base.prompts)
    work = [(base, results.BASE, False), (base, results.CONCISE, True)]
    if args.compare:
        work.append((open_model(settings, args.compare), results.STUDENT, False))
    mesh = sharding.make_mesh(settings.mesh)
    jobs = []
    for model, name, concise in work:
        evaluator = make_evaluator(settings, model, mesh, benchmarks, out / "eval")
        jobs.append((model, evaluator, System(name, model.path, model.weights, concise)))
    # All is opened before any weights are read, so that whatever does not fit is known at once.
    complete = [evaluator.open(system) for _, evaluator, system in jobs]
    cli.use_compilation_cache()
    loaded, params = None, None
    for (model, evaluator, system), done in zip(jobs, complete, strict=True):
        if not done and model is not loaded:
            params = None  # two models need not fit into memory side by side
            loaded, params = model, load(settings, model, evaluator.sampler.mesh)
        evaluator.run(system, params)
    return finish(out / "eval")


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The command line."""
    values = flags.FlagValues()
    define = {"flag_values": values}
    flags.DEFINE_string("model", None, 'the base: a folder, a hub id, or "tiny"', **define)
    flags.DEFINE_string("compare", None, "the trained model: a folder or a hub id", **define)
    flags.DEFINE_string("out", None, "folder of the results", **define)
    flags.DEFINE_string("regrade", None, "folder or file to grade again; nothing else", **define)
    flags.DEFINE_bool("no-thinking", False, "switch Qwen3's thinking mode off", **define)
    kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for flag, (key, text) in _FLAGS.items():
        default = config.get(default_config(), key)
        kinds[type(default)](flag, default, text, **define)
    args = cli.parse(values, argv)
    if not args.regrade:
        for name in ("model", "out"):
            if not getattr(args, name):
                raise InputError(f"--{name} is required, or --regrade")
    return args


def settings_of(args: flags.FlagValues) -> ConfigDict:
    """The configuration that the flags describe.

    Raises:
      InputError: a value that cannot be.
    """
    settings = default_config()
    settings.model.path = args.model
    settings.prompts.student_thinking = not args["no-thinking"].value
    settings.prompts.teacher_thinking = not args["no-thinking"].value
    for flag, (key, _) in _FLAGS.items():
        settings.update_from_flattened_dict({key: args[flag].value})
    if args.model in BASE_FOLDERS:
        for flag, key, value in (
            ("template", "prompts.template", "tiny"),
            ("dtype", "model.compute_dtype", "float32"),
        ):
            if args[flag].using_default_value:
                settings.update_from_flattened_dict({key: value})
    config.validate(settings)
    if settings.eval.source == "none":
        raise InputError("--benchmark=none leaves nothing to do")
    return settings


def open_model(settings: ConfigDict, path: str) -> Model:
    """Reads and checks everything of a model but its weights."""
    folder = hf.resolve_folder(path)
    model, tokenizer = (
        hf.load_config(folder, settings.model.compute_dtype),
        hf.load_tokenizer(folder),
    )
    hf.check_vocabulary(tokenizer, model)
    prompts = Prompts(tokenizer, **settings.prompts)
    prompts.check_stop_ids(hf.stop_token_ids(folder, tokenizer))
    digest = fingerprint(folder / file for file in weights.check_files(folder, model))
    return Model(path, folder, digest, model, tokenizer, prompts)


def open_problems(settings: ConfigDict, prompts: Prompts) -> list[Benchmark]:
    """The benchmarks; what is left out of them is printed."""

    def accept(example: Example) -> str | None:
        return prompts.rejection(example.problem, settings.sampler.max_prompt_tokens)

    benchmarks = open_benchmarks(
        settings.eval.source,
        settings.seed,
        limit=settings.eval.limit,
        samples_per_level=settings.eval.samples_per_level,
        accept=accept,
    )
    print("\n".join(benchmark.report for benchmark in benchmarks))
    return benchmarks


def make_evaluator(
    settings: ConfigDict,
    model: Model,
    mesh: Mesh,
    benchmarks: Sequence[Benchmark],
    folder: pathlib.Path,
) -> Evaluator:
    """The evaluator of a model's systems.

    Raises:
      InputError: the budget leaves too few positions for the prompts, or the devices do not divide
        the batch or the model.
    """
    prompts, budget = model.prompts, settings.eval.max_response_tokens
    room = model.config.max_position_embeddings - budget
    longest = max(
        len(side(example.problem))
        for benchmark in benchmarks
        for example in benchmark.examples
        for side in (prompts.student, prompts.teacher)
    )
    if longest > settings.sampler.max_prompt_tokens:
        raise InputError(
            f"--max_prompt_tokens={settings.sampler.max_prompt_tokens} cannot hold a prompt of "
            f"{longest} tokens of {model.path}: raise it to at least {longest}"
        )
    if longest > room:
        raise InputError(
            f"--budget={budget} is too much: with a prompt of {longest} tokens it exceeds the "
            f"{model.config.max_position_embeddings} positions of {model.path}"
        )
    decoding = decode_mesh(model.config, mesh, settings.mesh.decode_tensor)
    sharding.check_divides(decoding, "batch_size", settings.eval.batch_size)
    sampler = Sampler(
        model=model.config,
        mesh=decoding,
        prompt_buckets=rollout.length_buckets(min(room, settings.sampler.max_prompt_tokens)),
        response_width=budget,
        vocab_size=len(model.tokenizer),
        stop_ids=hf.stop_token_ids(model.folder, model.tokenizer),
        pad_id=model.tokenizer.pad_token_id,
        slots=settings.eval.batch_size,
    )
    return Evaluator(settings, benchmarks, prompts, model.tokenizer, sampler, folder)


def load(settings: ConfigDict, model: Model, mesh: Mesh) -> qwen3.Params:
    """Reads a model's weights, cast and split as decoding wants them.

    Args:
      mesh: of decoding.
    """
    shardings = qwen3.shardings(model.config, mesh, sharding.DECODE_RULES)
    return weights.load_params(
        model.folder, model.config, shardings=shardings, dtype=settings.model.compute_dtype
    )


def regrade(path: pathlib.Path) -> int:
    """Grades stored responses again, and renews the summaries that stand on them."""
    graded = summary.regrade(path)
    for files in graded:
        print(f"graded {files.responses}: {summary.headline(files)}")
    for folder in sorted({files.folder.parent for files in graded}):
        if (folder / results.SUMMARY).exists():  # else it is not complete yet
            finish(folder)
    return cli.EXIT_DONE


def finish(folder: pathlib.Path) -> int:
    """Writes the summary of an eval folder and prints its tables."""
    found = summary.summarise(folder)
    write_json(folder / results.SUMMARY, found)
    print(f"\n{report.tables(found)}\n\neverything is in {folder}")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(cli.run(main))
