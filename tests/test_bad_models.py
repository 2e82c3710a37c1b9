"""Model folders that lie: architecture, weights, tokenizer, chat template."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
from bad_inputs import Case, Sandbox, assert_refused, fifo, script, table

from opsdc_jax import cli

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


def config(changes):
    """Training from a copy of the tiny model with other values in config.json."""
    return lambda sandbox: sandbox.model(config=changes)


def weights(change):
    """The same with other bytes in the file of the weights; None: without the file."""

    def spoiled(sandbox):
        path = sandbox.folder() / WEIGHTS
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        return sandbox.on(path.parent)

    return spoiled


def tensors(change):
    """The same with other tensors in it."""

    def spoiled(sandbox):
        path = sandbox.folder() / WEIGHTS
        found = safetensors.numpy.load_file(path)
        change(found)
        safetensors.numpy.save_file(found, path)
        return sandbox.on(path.parent)

    return spoiled


def header(changes):
    """The same with another description of one tensor in the file's header."""

    def spoil(content):
        (size,) = struct.unpack("<Q", content[:8])
        described = json.loads(content[8 : 8 + size])
        described[NORM] |= changes
        text = json.dumps(described).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return weights(spoil)


def index(weight_map, keep_weights=True):
    """The same with an index beside the weights."""

    def spoiled(sandbox):
        folder = sandbox.folder()
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        if not keep_weights:
            (folder / WEIGHTS).unlink()
        return sandbox.on(folder)

    return spoiled


def linked(target):
    """The same with a link in place of the weights."""

    def spoiled(sandbox):
        path = sandbox.folder() / WEIGHTS
        path.unlink()
        path.symlink_to(target)
        return sandbox.on(path.parent)

    return spoiled


def replaced(name, content):
    """The same with another file in place of one, or None."""

    def spoiled(sandbox):
        folder = sandbox.folder()
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)
        return sandbox.on(folder)

    return spoiled


def pickled(sandbox):
    folder = sandbox.folder()
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    return sandbox.on(folder)


def piped(name):
    def spoiled(sandbox):
        folder = sandbox.folder()
        (folder / name).unlink()
        fifo(folder / name)
        return sandbox.on(folder)

    return spoiled


def vocabulary(change):
    """The same with other ids in tokenizer.json."""

    def spoiled(sandbox):
        path = sandbox.folder() / "tokenizer.json"
        found = json.loads(path.read_text())
        change(found["model"]["vocab"])
        path.write_text(json.dumps(found))
        return sandbox.on(path.parent)

    return spoiled


def ended_otherwise(name, *arguments):
    """A script on a model that ends responses with another token than its chat template does."""

    def spoiled(sandbox):
        folder = sandbox.folder(
            tokenizer_config={"eos_token": "<|endoftext|>"}, generation_config={"eos_token_id": 0}
        )
        return [name, f"--model={folder}", *arguments]

    return spoiled


def template(text):
    return replaced("chat_template.jinja", text)


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 256}
ARCHITECTURES: list[Case] = [
    ("no config.json", replaced("config.json", None), "config.json does not exist"),
    ("empty config.json", replaced("config.json", ""), "config.json cannot be read"),
    ("a list", replaced("config.json", "[]"), "config.json does not hold a JSON object"),
    ("deep nesting", replaced("config.json", "[" * 10**5), "config.json cannot be read"),
    ("a pipe", piped("config.json"), "config.json cannot be read: it is a pipe"),
    ("another model", config({"model_type": "llama"}), "model_type is 'llama', supported is"),
    ("a mixture of experts", config({"model_type": "qwen3_moe"}), "model_type is 'qwen3_moe'"),
    ("nothing said", config({"model_type": None}), "model_type is None"),
    ("a field missing", config({"hidden_size": None}), "config.json lacks hidden_size"),
    ("no width", config({"hidden_size": 0}), "config.json holds hidden_size=0"),
    ("negative", config({"intermediate_size": -256}), "holds intermediate_size=-256"),
    ("no layers", config({"num_hidden_layers": 0}), "holds num_hidden_layers=0"),
    ("a billion layers", config({"num_hidden_layers": 10**9}), "holds num_hidden_layers=10{9}:"),
    ("a huge vocabulary", config({"vocab_size": 10**15}), "holds vocab_size=10{15}:"),
    ("large sizes", config({"hidden_size": 2**30}), "config.json asks for"),
    ("text for a number", config({"head_dim": "32"}), "holds head_dim='32'"),
    ("true for a number", config({"head_dim": True}), "holds head_dim=True"),
    ("odd heads", config({"head_dim": 31}), "holds head_dim=31"),
    ("heads that share unevenly", config({"num_attention_heads": 3}), "does not divide 3 heads"),
    ("more shared than heads", config({"num_key_value_heads": 8}), "does not divide 4 heads"),
    ("nan", config({"rms_norm_eps": float("nan")}), "holds rms_norm_eps=nan"),
    ("no rope", config({"rope_theta": None, "rope_parameters": None}), "lacks rope_theta"),
    ("rope in words", config({"rope_parameters": {"rope_theta": "big"}}), "rope_theta='big'"),
    ("rope of 0", config({"rope_parameters": {"rope_theta": 0}}), "holds rope_theta=0"),
    ("rope as a list", config({"rope_parameters": [1]}), r"rope_parameters=\[1\], which is no obj"),
    ("rope of a kind", config({"rope_scaling": {"type": "linear"}}), "rope type 'linear' is not"),
    ("yarn by nan", config({"rope_scaling": YARN | {"factor": float("nan")}}), "not factor=nan"),
    ("yarn in words", config({"rope_scaling": YARN | {"factor": "4"}}), "not factor='4'"),
    ("other sizes", config({"intermediate_size": 128}), "mlp.*has shape.*config.json asks for"),
    ("few positions", config({"max_position_embeddings": 9}), "exceeds the model's 9 positions"),
]
CHECKPOINTS: list[Case] = [
    ("no weights", weights(lambda content: None), "holds neither model.safetensors nor"),
    ("pickled weights", pickled, "neither.*only pytorch_model.bin, which is never read: convert"),
    ("empty weights", weights(lambda content: b""), "model.safetensors cannot be read.*again"),
    ("half of the weights", weights(lambda content: content[:99_999]), "cannot be read.*again"),
    (
        "a header beyond the file",
        weights(lambda c: struct.pack("<Q", 10**7) + c[8:]),
        "cannot be r",
    ),
    (
        "a header of 2 to the 63",
        weights(lambda c: struct.pack("<Q", 2**63) + c[8:]),
        "cannot be re",
    ),
    ("no JSON in the header", weights(lambda c: c[:8] + b"x" * 999 + c[1007:]), "cannot be read"),
    ("another format", weights(lambda content: b"GGUF" + bytes(9999)), "model.safetensors cannot"),
    (
        "a pickle by its name",
        weights(lambda c: b"\x80\x04c__main__\nx\n."),
        "model.safetensors can",
    ),
    ("a huge shape", header({"shape": [2**40, 2**20]}), "model.safetensors cannot be read"),
    ("a shape beyond 64 bits", header({"shape": [2**63, 4]}), "model.safetensors cannot be read"),
    ("a negative shape", header({"shape": [-128]}), "model.safetensors cannot be read"),
    ("sizes that contradict", header({"shape": [64]}), "model.safetensors cannot be read"),
    ("an offset beyond the file", header({"data_offsets": [0, 2**50]}), "cannot be read"),
    ("a dtype that is none", header({"dtype": "F99"}), "model.safetensors cannot be read"),
    ("whole numbers", tensors(lambda t: t.update({NORM: np.ones(128, np.int32)})), "norm.*is I32"),
    ("a missing tensor", tensors(lambda t: t.pop(NORM)), f"missing tensor {NORM}"),
    ("an extra tensor", tensors(lambda t: t.update(x=np.ones(3))), "unexpected tensor x"),
    ("a shape of another", tensors(lambda t: t.update({NORM: np.ones(3, np.float32)})), NORM),
    ("an index of nothing", index({}), "index.json has no weight_map"),
    ("an index of a list", index(["x"]), "index.json has no weight_map"),
    ("an index of no file", index({NORM: "gone.safetensors"}), "gone.safetensors cannot be read"),
    ("an index that climbs", index({NORM: "../x.safetensors"}), "lies outside the folder"),
    ("an index to the root", index({NORM: "/etc/passwd"}), "'/etc/passwd', which lies outside"),
    ("an index to the folder above", index({NORM: ".."}), "names '..', which is no .safetensors"),
    ("an index of pickles", index({NORM: "x.bin"}), "names 'x.bin', which is no .safetensors file"),
    (
        "an index that misplaces",
        index({NORM: WEIGHTS, "y": WEIGHTS, "z": 1}),
        "index.json names '1'",
    ),
    ("a link to another file", linked("/etc/passwd"), "model.safetensors cannot be read"),
    ("a link to nothing", linked("nowhere"), "holds neither"),
    ("a link to a device", linked("/dev/zero"), "cannot be read: it is a pipe or a device"),
    ("a pipe of weights", piped(WEIGHTS), "cannot be read: it is a pipe or a device"),
]
TOKENIZERS: list[Case] = [
    (
        "no tokenizer",
        lambda s: s.model(tokenizer=None, tokenizer_config=None),
        "holds no tokenizer.json",
    ),
    ("broken tokenizer", replaced("tokenizer.json", "{"), "the tokenizer cannot be loaded"),
    ("a tokenizer of a list", replaced("tokenizer.json", "[1]"), "the tokenizer cannot be loaded"),
    (
        "no end",
        lambda s: s.model(tokenizer_config={"eos_token": None}),
        "tokenizer has no eos_token",
    ),
    ("no padding", lambda s: s.model(tokenizer_config={"pad_token": None}), "has no pad_token_id"),
    ("a larger vocabulary", vocabulary(lambda v: v.update(x=224)), "has 225 entries, the embed"),
    ("ids with gaps", vocabulary(lambda v: v.update(start=9000)), "ids up to 9000"),
    ("no template", template(None), "has no chat template: use one of a chat model"),
    ("an empty template", template(""), "has no chat template|drops or changes the user's message"),
    ("a broken template", template("{% for %}"), "chat template cannot be rendered.*SyntaxError"),
    (
        "a template that raises",
        template("{{ raise_exception('no') }}"),
        "be rendered.*no.: use the",
    ),
    (
        "a template of what is not there",
        template("{{ messages[7].content }}"),
        "cannot be rendered",
    ),
    ("a template without the problem", template("hello"), "ignores add_generation_prompt"),
    (
        "a template that reaches out",
        template("{{ ''.__class__.mro() }}"),
        "rendered.*SecurityError",
    ),
    ("a template that reads files", template("{% include '/etc/passwd' %}"), "cannot be rendered"),
    (
        "a template with code",
        template("{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}"),
        "cannot be rendered.*SecurityError|cannot be rendered.*UndefinedError",
    ),
    (
        "an end in words",
        lambda s: s.model(generation_config={"eos_token_id": "<|im_end|>"}),
        "generation_config.json holds eos_token_id=.*give one token id or a list",
    ),
    (
        "an end of halves",
        lambda s: s.model(generation_config={"eos_token_id": [2, 1.5]}),
        "generation_config.json holds eos_token_id=.*give one token id or a list",
    ),
    (
        "another end",
        lambda s: s.model(generation_config={"eos_token_id": 7}),
        "ends responses at .7., the tokenizer at 2",
    ),
    (
        "a sample of another end than the template's",
        ended_otherwise("sample", "--prompt=start 1", "--template=tiny"),
        "ends an answer with 2 .*, which is not among the ids",
    ),
    (
        "an evaluation of another end than the template's",
        ended_otherwise("evaluate", "--out=unused", "--benchmark=tiny", "--template=tiny"),
        "ends an answer with 2 .*, which is not among the ids",
    ),
    (
        "damaged generation settings",
        replaced("generation_config.json", "{"),
        "generation_config.json cannot be read",
    ),
]


@table(ARCHITECTURES + CHECKPOINTS + TOKENIZERS)
def test_refused(tmp_path, capfd, monkeypatch, arguments, says):
    assert_refused(Sandbox(tmp_path), capfd, monkeypatch, arguments, says)


@pytest.mark.parametrize("also", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(tmp_path, monkeypatch, capfd, also):
    """auto_map asks transformers for it; the folder's own class is never imported."""
    sandbox = Sandbox(tmp_path)
    marker = tmp_path / "executed"
    folder = sandbox.folder()
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass X: pass\n")
    auto_map = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"],
    }
    path = folder / also
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    monkeypatch.setattr(script("train"), "train", lambda *_: False)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # should anybody ask
    _, *rest = sandbox.on(folder)
    code = cli.run(script("train").main, ["train.py", *rest])
    assert code in (cli.EXIT_STOPPED, cli.EXIT_BAD_INPUT)
    assert not marker.exists()
    assert not list(tmp_path.rglob("__pycache__"))


def test_weights_in_the_hubs_cache_are_links(tmp_path, monkeypatch):
    """So a link that leaves the folder is followed, to a file that is read as safetensors only."""
    sandbox = Sandbox(tmp_path)
    path = sandbox.folder() / WEIGHTS
    (tmp_path / "blobs").mkdir()
    path.rename(tmp_path / "blobs" / "abc")
    path.symlink_to(os.path.relpath(tmp_path / "blobs" / "abc", path.parent))
    monkeypatch.setattr(script("train"), "train", lambda *_: False)
    _, *rest = sandbox.on(path.parent)
    assert cli.run(script("train").main, ["train.py", *rest]) == cli.EXIT_STOPPED
