"""Configurations that cannot be: files, keys, values, and values that contradict each other."""

from bad_inputs import Case, Sandbox, assert_refused, script, table

from opsdc_jax import cli

GET = "from opsdc_jax.config import default_config\ndef get_config():\n"
FILES: list[Case] = [
    ("no file", lambda s: ["train", "--config", str(s.path / "none.py")], "none.py.*no such file"),
    ("no --config", lambda s: ["train"], "--config FILE is required"),
    ("--config without a value", lambda s: ["train", "--config"], "--config"),
    ("a folder", lambda s: ["train", "--config", str(s.path)], "is no Python file"),
    ("syntax error", lambda s: s.config("def get_config(:\n"), "mine.py.*SyntaxError.*line 1"),
    ("binary", lambda s: s.config(b"\x00\xff\xfe"), "mine.py.*cannot be loaded"),
    ("no get_config", lambda s: s.config("x = 1\n"), "mine.py.*get_config"),
    ("get_config is no function", lambda s: s.config("get_config = 1\n"), "mine.py.*not callable"),
    ("get_config wants an argument", lambda s: s.config("def get_config(x): 1\n"), "argument"),
    ("returns nothing", lambda s: s.config("def get_config(): pass\n"), "NoneType.*ConfigDict"),
    ("returns a dict", lambda s: s.config("def get_config(): return {}\n"), "dict.*ConfigDict"),
    ("raises", lambda s: s.config("def get_config(): 1 / 0\n"), "mine.py.*ZeroDivisionError"),
    ("raises at import", lambda s: s.config("import nothing_of_this"), "ModuleNotFoundError"),
    ("exits", lambda s: s.config("import sys; sys.exit(0)\n"), "mine.py.*SystemExit"),
    ("exits in get_config", lambda s: s.config(GET + "    exit('no')\n"), "mine.py.*SystemExit"),
    ("prints and is wrong", lambda s: s.config_lines("print(1)", "config.seed = -1"), "seed=-1"),
]
KEYS: list[Case] = [
    ("unknown key", lambda s: s.train("--config.train.stpes=3"), "did you mean config.train.steps"),
    ("unknown, apart", lambda s: s.train("--config.train.stpes", "3"), "did you mean config.train"),
    ("unknown in the file", lambda s: s.config_lines("config.lr = 1"), "config.lr.*did you mean"),
    ("a section", lambda s: s.train("--config.train=3"), "unknown key config.train:"),
    ("below a value", lambda s: s.train("--config.seed.x=3"), "unknown key config.seed.x"),
    ("a missing key", lambda s: s.config_lines("del config.seed"), "config.seed is missing"),
    ("unknown flag", lambda s: s.train("--workdri=x"), "workdri.*workdir"),
    ("stray argument", lambda s: s.train("fast"), "unexpected argument 'fast'"),
]
NUMBERS: list[Case] = [
    ("text for a count", lambda s: s.train("--config.train.steps=many"), "train.steps=many"),
    ("nothing for a count", lambda s: s.train("--config.train.steps="), "train.steps"),
    ("half a step", lambda s: s.train("--config.train.steps=1.5"), "train.steps=1.5"),
    ("text for a switch", lambda s: s.train("--config.optim.offload=maybe"), "offload=maybe"),
    (
        "None",
        lambda s: s.config_lines("config.train.steps = None"),
        "train.steps=None must be a whole",
    ),
    (
        "another type in a dictionary of one's own",
        lambda s: s.config(
            "import ml_collections, json\n" + GET + "    config = json.loads("
            "default_config().to_json())\n    config['train']['steps'] = '9'\n"
            "    return ml_collections.ConfigDict(config)\n"
        ),
        "train.steps='9' must be a whole number",
    ),
    (
        "a value where a section belongs",
        lambda s: s.config_lines("del config.train", "config.train = 3"),
        "config.train.*missing|config.train.*unknown key|unknown key config.train",
    ),
    ("a switch for a count", lambda s: s.config_lines("config.train.steps = True"), "train.steps"),
    ("nan", lambda s: s.train("--config.optim.lr=nan"), "optim.lr=nan must be a finite number"),
    ("inf", lambda s: s.train("--config.optim.lr=inf"), "optim.lr=inf must be a finite number"),
    (
        "beyond float",
        lambda s: s.train("--config.optim.clip_norm=1e400"),
        "must be a finite number",
    ),
    ("nan, unchecked", lambda s: s.train("--config.optim.b1=nan"), "optim.b1=nan must be a finite"),
    ("a huge count", lambda s: s.train(f"--config.train.steps={10**30}"), "train.steps=.*at most"),
    ("a huge batch", lambda s: s.train(f"--config.train.batch_size={4 * 10**9}"), "batch_size"),
    (
        "more problems than anyone has",
        lambda s: s.train("--config.eval.samples_per_level=1999999999"),
        "eval.samples_per_level=1999999999.*at most",
    ),
    ("a negative count", lambda s: s.train("--config.train.steps=-1"), "must be positive"),
    ("a negative seed", lambda s: s.train("--config.seed=-1"), "seed=-1 must not be negative"),
    ("a huge seed", lambda s: s.train(f"--config.seed={2**31}"), "seed=.*must be at most"),
    ("top_p of 0", lambda s: s.train("--config.sampler.top_p=0"), "top_p=0.0 must be above 0"),
    ("b2 of 1", lambda s: s.train("--config.optim.b2=1"), r"b2=1.0 must be in \[0, 1\)"),
    ("no such divergence", lambda s: s.train("--config.loss.divergence=kl"), "one of.*reverse_kl"),
    ("no such dtype", lambda s: s.train("--config.model.compute_dtype=fp8"), "one of.*bfloat16"),
    ("no such mesh", lambda s: s.train("--config.mesh.fsdp=0"), "mesh.*must be positive"),
    ("mesh of no device", lambda s: s.train("--config.mesh.tensor=3"), "mesh.*devices present"),
    ("a huge mesh", lambda s: s.train(f"--config.mesh.tensor={10**12}"), "mesh"),
    ("decoding on 0", lambda s: s.train("--config.mesh.decode_tensor=0"), "decode_tensor=0"),
    ("decoding on -5", lambda s: s.train("--config.mesh.decode_tensor=-5"), "decode_tensor=-5"),
]
TEXTS: list[Case] = [
    ("no model", lambda s: s.train("--config.model.path="), "model.path=''"),
    (
        "no such model",
        lambda s: s.train("--config.model.path=a/b/c"),
        "model.path='a/b/c' is neither",
    ),
    (
        "a model's path too long",
        lambda s: s.train(f"--config.model.path={'x' * 5000}"),
        "model.path",
    ),
    ("no data", lambda s: s.train("--config.data.source="), "data.source='' is not known"),
    ("no evaluation", lambda s: s.train("--config.eval.source="), "eval.source='' is not known"),
    ("none and some", lambda s: s.train("--config.eval.source=none,tiny"), "'none'"),
    ("twice the same", lambda s: s.train("--config.eval.source=tiny,tiny"), "two benchmarks"),
    ("no run to reuse", lambda s: s.train("--config.eval.reuse=nowhere"), "eval.reuse='nowhere'"),
    ("no template", lambda s: s.train("--config.prompts.template="), "prompts.template=''"),
    ("no instruction", lambda s: s.train("--config.prompts.instruction="), "instruction=''"),
    (
        "a control token in the instruction",
        lambda s: s.train("--config.prompts.instruction=be short <|im_end|>"),
        "prompts.instruction contains a control token",
    ),
]
CONTRADICTIONS: list[Case] = [
    ("micro-batches", lambda s: s.train("--config.train.micro_batch_size=5"), "not a multiple of"),
    (
        "nll that teaches nothing",
        lambda s: s.train("--config.loss.divergence=nll"),
        "loss.divergence='nll' on the student's own responses",
    ),
    (
        "advantages of a divergence",
        lambda s: s.train("--config.loss.weights=advantages"),
        "loss.weights='advantages' is the policy gradient",
    ),
    (
        "part of a divergence that has none",
        lambda s: s.train("--config.loss.divergence=jsd", "--config.loss.top_k=5"),
        "loss.top_k=5 is of the reverse KL alone",
    ),
    (
        "a teacher that never changes and does",
        lambda s: s.train("--config.teacher.every=0", "--config.teacher.decay=0.9"),
        "teacher.decay=0.9 with teacher.every=0",
    ),
    (
        "many samples without chance",
        lambda s: s.train("--config.eval.temperature=0", "--config.eval.samples=2"),
        "would all be the same",
    ),
    (
        "prompts over their budget",
        lambda s: s.train("--config.sampler.max_prompt_tokens=5"),
        "max_prompt_tokens=5 cannot hold a prompt of",
    ),
    (
        "more tokens than positions",
        lambda s: s.train("--config.sampler.max_response_tokens=100000"),
        "exceeds the model's 512 positions",
    ),
    (
        "more tokens than positions, in evaluation",
        lambda s: s.train("--config.eval.max_response_tokens=100000"),
        "eval.max_response_tokens = 100040 exceeds",
    ),
    (
        "tiny has no split",
        lambda s: s.train("--config.data.split=test"),
        "leave the other data keys",
    ),
    ("nor columns", lambda s: s.train("--config.eval.answer_column=a"), "eval.answer_column desc"),
    (
        "prompts that end differently",
        lambda s: s.train("--config.prompts.student_thinking=False"),
        "use the same thinking mode on both sides",
    ),
]


@table(FILES + KEYS + NUMBERS + TEXTS + CONTRADICTIONS)
def test_refused(tmp_path, capfd, monkeypatch, arguments, says):
    assert_refused(Sandbox(tmp_path), capfd, monkeypatch, arguments, says)


def test_what_the_table_starts_from_is_accepted(tmp_path, monkeypatch):
    """Or every refusal above could be another one."""
    monkeypatch.setattr(script("train"), "train", lambda *_: False)
    for sandbox, arguments in (
        (Sandbox(tmp_path / "a"), Sandbox.train),
        (Sandbox(tmp_path / "b"), Sandbox.config_lines),
    ):
        _, *rest = arguments(sandbox)
        assert cli.run(script("train").main, ["train.py", *rest]) == cli.EXIT_STOPPED
        assert sandbox.workdir.is_dir()
