import json

import pytest
from helpers import SHARED, launch
from transformers import AutoTokenizer

from common.errors import UserError
from tools.export import export
from tools.figures import loss_figure
from tools.generate import complete, encode, load, main


@pytest.fixture(scope="module")
def run_dir(tiny_run):
    arguments, folder = tiny_run("generate", **{"train.steps": 3})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def checkpoint(run_dir, tmp_path_factory) -> str:
    return str(export(run_dir, tmp_path_factory.mktemp("generate") / "exported"))


@pytest.mark.slow
def test_infilling_keeps_prefix_and_suffix(checkpoint, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    text = "The Fox saw a [MASK:4] and went [MASK:3] to the river."
    arguments = [
        checkpoint,
        "--infill",
        text,
        "--num_samples",
        "3",
        "--steps",
        "4",
        "--seed",
        "7",
        "--output",
        str(output),
    ]
    assert main(arguments) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 3 and len({record["text"] for record in records}) > 1
    for record in records:
        assert record["text"].startswith("The Fox saw a") and record["text"].endswith(" to the river.")
        assert " and went" in record["text"] and "MASK" not in record["text"] and record["request"] == text
    assert main(arguments) == 2 and "exists; choose another name" in capsys.readouterr().err


@pytest.mark.slow
def test_a_seed_gives_one_text(checkpoint, capsys):
    def text(seed: int) -> str:
        assert main([checkpoint, "--prompt", "Once", "--length", "12", "--steps", "6", "--seed", str(seed)]) == 0
        return capsys.readouterr().out

    assert text(1) == text(1) != text(2)
    assert text(1).startswith("Once")


@pytest.mark.slow
def test_without_a_prompt_text_begins_after_the_start_token(checkpoint, capsys):
    assert main([checkpoint, "--length", "10", "--steps", "5", "--order", "confidence", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--length", "9999"], "tokens with the gaps, but the model takes 256"),
        (["--length", "0"], "must be at least 1"),
        (["--steps", "0"], "expected steps >= 1"),
    ],
)
def test_errors_are_one_line(checkpoint, arguments, message, capsys):
    assert main([checkpoint, *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]


def test_a_folder_that_is_no_checkpoint(base_dir, capsys):
    assert main(["/nowhere"]) == 2
    assert main([str(base_dir("llama"))]) == 2
    error = capsys.readouterr().err
    assert "is an autoregressive model (LlamaForCausalLM" in error and "expected a masked diffusion model" in error


@pytest.mark.slow
def test_without_the_shift_a_gap_at_the_front_needs_no_start_token(tiny_run, tmp_path):
    arguments, folder = tiny_run("generate_no_shift", **{"train.steps": 1, "diffusion.shift": "false"})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    model, tokenizer = load(str(export(folder, tmp_path / "exported")), device="cpu")
    model.config.diffusion["start_token_id"] = None
    [text] = complete(model, tokenizer, "[MASK:3] went to the river.", steps=3)
    assert text.endswith(" went to the river.") and len(text) > len(" went to the river.")


def test_encode_counts_gaps_and_needs_a_start(tokenizer):
    ids = encode("one [MASK:3] two[MASK:1]", tokenizer, 99, None)
    assert ids == [*tokenizer.encode("one"), 99, 99, 99, *tokenizer.encode(" two"), 99]
    assert encode("[MASK:2] x", tokenizer, 99, 5)[:3] == [5, 99, 99]
    with pytest.raises(UserError, match="begin with a word"):
        encode("[MASK:2] x", tokenizer, 99, None)
    assert encode("[MASK:2] x", tokenizer, 99, None, shift=False)[:2] == [99, 99]


@pytest.mark.skipif(not SHARED.exists(), reason="the real LLaMA-2 tokenizer is not here")
def test_sentencepiece_gets_no_second_space():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data" / "tokenizers" / "llama2")
    ids = encode("There was a [MASK:2] in the sun.", tokenizer, 811, None)
    assert [i for i in ids if i != 811] == tokenizer("There was a in the sun.")["input_ids"]


@pytest.mark.slow
def test_figure(run_dir, tmp_path):
    from PIL import Image

    with Image.open(loss_figure([run_dir, run_dir], tmp_path / "loss.png")) as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert len(set(image.convert("L").resize((100, 100)).tobytes())) > 20
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds no run: config\.yaml not found"):
        loss_figure([tmp_path], tmp_path / "x.png")
    (tmp_path / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="has no finished step"):
        loss_figure([tmp_path], tmp_path / "x.png")
