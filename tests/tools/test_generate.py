import fcntl
import json
import resource
import shutil
from pathlib import Path

import pytest
from helpers import SHARED, launch
from transformers import AutoTokenizer

from common.errors import UserError
from pretrain.model.settings import SamplingSettings
from tools.decoding import complete_all, encode, load, pieces, request
from tools.export import export
from tools.figures import loss_figure
from tools.generate import main, read_prompts, rule_of


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
        (["--prompt", "x", "--length", "9999"], "9999 tokens in gaps, but the model takes 256"),
        (["--length", "0"], "--length is 0, expected at least 1"),
        (["--steps", "-1"], "steps is -1, expected a number of steps from 1 on"),
        (["--threshold", "0.9", "--factor", "1"], "threshold and factor each say how many"),
        (["--prompt", "x", "--infill", "y"], "--prompt and --infill each say what to write"),
        (["--infill", "no gap"], "nothing to find in 'no gap'"),
        (["--resume"], "--resume continues an --output"),
        (["--watch", "--output", "x.jsonl"], "--output is for a file"),
        (["--watch", "--compare", "random"], "--watch and --compare each show"),
        (["--output", "/nowhere/x.jsonl"], "there is no folder /nowhere"),
        (["--output", "/tmp"], "is a folder, expected a file"),
        (["--infill", "[MASK:12345678901234]"], "asks for more tokens than any text has"),
        (["--compare", "randm"], "--compare randm: expected random, confidence"),
        (["--prompts", "/nowhere.txt"], "--prompts /nowhere.txt cannot be read"),
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
    asked = request("[MASK:3] went to the river.", model, tokenizer)
    [[found]] = complete_all(model, tokenizer, [asked], 0, 1, SamplingSettings(steps=3))
    assert found.text.endswith(" went to the river.") and len(found.text) > len(" went to the river.")


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


def test_prompts_are_lines_gaps_or_json(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = ["Once", "", "A [MASK:3] b", '{"prompt": "Two\\nlines"}', '{"text": "x [MASK:1]"}', "a\u2028b"]
    expected = ["Once[MASK:7]", "A [MASK:3] b", "Two\nlines[MASK:7]", "x [MASK:1]", "a\u2028b[MASK:7]"]
    for begin, end in (("", "\n"), ("\ufeff", "\r\n")):
        path.write_bytes((begin + end.join(lines) + end).encode())
        assert read_prompts(str(path), 7) == expected
    for bad, message in (
        ('{"question": "x"}', ":1: expected JSON with `prompt` or `text`"),
        ('{"text": 3}', "is a int"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            read_prompts(str(path), 7)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(path), 7)


def test_a_rule_is_an_order_or_pairs():
    assert rule_of("entropy") == {"order": "entropy"}
    assert rule_of("threshold=0.9,block_length=8,cache=window") == {
        "threshold": 0.9, "block_length": 8, "cache": "window",
    }  # fmt: skip
    for bad in ("", "threshold", "threshold=high", "beams=4"):
        with pytest.raises(UserError, match="expected random, confidence"):
            rule_of(bad)


@pytest.mark.slow
def test_a_text_depends_on_its_seed_alone_and_not_on_its_batch(checkpoint, tmp_path):
    """In a file with others, in batches of any size, and alone; a stopped file continues to the same bytes."""
    prompts = tmp_path / "prompts.txt"
    texts = ["The Fox", "Once upon a time there was a [MASK:3] in the wood", "A", "There [MASK:2] was [MASK:5]."]
    prompts.write_text("\n".join(texts))
    request = ["--prompts", str(prompts), "--length", "6", "--num_samples", "2", "--seed", "5", "--order", "entropy"]
    written = []
    for size in (1, 3, 8):
        output = tmp_path / f"{size}.jsonl"
        assert main([checkpoint, *request, "--batch_size", str(size), "--output", str(output)]) == 0
        written.append(output.read_bytes())
    assert written[0] == written[1] == written[2]
    records = [json.loads(line) for line in written[0].splitlines()]
    assert [(r["request"], r["sample"]) for r in records] == [
        (text if "MASK" in text else text + "[MASK:6]", k) for text in texts for k in range(2)
    ]
    assert records[0]["text"] != records[1]["text"]
    assert records[0]["nfe"] == 6 and records[0]["tokens_per_forward"] == 1.0 and records[0]["order"] == "entropy"

    alone = tmp_path / "alone.jsonl"
    arguments = [checkpoint, "--infill", texts[3], "--seed", "5", "--order", "entropy", "--output", str(alone)]
    assert main(arguments) == 0
    assert json.loads(alone.read_text())["text"] == records[6]["text"]

    stopped = tmp_path / "stopped.jsonl"
    again = [checkpoint, *request, "--batch_size", "3", "--output", str(stopped), "--resume"]
    for cut in (0, 3, len(written[0]) - 7, len(written[0])):
        stopped.write_bytes(written[0][:cut])
        assert main(again) == 0
        assert stopped.read_bytes() == written[0]


@pytest.mark.slow
def test_a_file_of_another_command_is_not_continued(checkpoint, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    request = [checkpoint, "--prompt", "Once", "--length", "4", "--output", str(output), "--resume"]
    assert main(request) == 0
    before = output.read_bytes()
    for change, message in (
        (["--seed", "1"], "has another seed"),
        (["--temperature", "0.5"], "has another temperature"),
        (["--length", "5"], "has another request"),
    ):
        assert main([*request, *change]) == 2
        assert message in capsys.readouterr().err and output.read_bytes() == before
    assert main([*request, "--ignore_eos"]) == 2 and "has another ignore_eos" in capsys.readouterr().err
    assert main([*request, "--temperature", "0"]) == 2 and "has another temperature" in capsys.readouterr().err
    with open(output) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(request) == 2 and "another process writes" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    assert main([str(other), *request[1:]]) == 2 and "has another checkpoint" in capsys.readouterr().err
    assert main(request[:-1]) == 2 and "exists; choose another name, or --resume" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.write_text('{"text": "something else"}\n')
    assert main(request) == 2 and "is no sample of this command" in capsys.readouterr().err
    output.write_text("[]\n" * 9)
    assert main(request) == 2 and "has 9 samples, more than these 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_record_names_every_setting_that_counts(checkpoint, tmp_path):
    """Also those that are 0, and text with other line ends than ours: what is written is read again."""
    output = tmp_path / "out.jsonl"
    request = [checkpoint, "--infill", "A\u2028B\x0c[MASK:2]", "--temperature", "0", "--threshold", "0"]
    for again in ([], ["--resume"]):
        assert main([*request, "--output", str(output), *again]) == 0
    [record] = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert record["temperature"] == 0 and record["threshold"] == 0 and record["checkpoint"] == checkpoint
    assert record["nfe"] == 1 and record["tokens_per_forward"] == 2.0


@pytest.mark.slow
def test_a_prompt_that_stands_twice_gives_two_samples(checkpoint, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("The Fox\nThe Fox\n")
    assert main([checkpoint, "--prompts", str(prompts), "--length", "9", "--output", str(output)]) == 0
    first, second = [json.loads(line) for line in output.read_text().splitlines()]
    assert (first["sample"], second["sample"]) == (0, 1) and first["text"] != second["text"]


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_one_line(checkpoint, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))  # as on a full disk
    try:
        assert main([checkpoint, "--prompt", "x", "--length", "2", "--output", str(output)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "what stands there is kept, --resume continues" in capsys.readouterr().err
    assert main([checkpoint, "--prompt", "x", "--length", "2", "--output", str(output), "--resume"]) == 0
    assert len(output.read_text().splitlines()) == 1


def test_what_looks_like_a_special_token_is_text(tiny_checkpoint):
    model, tokenizer = load(str(tiny_checkpoint), device="cpu")
    mask = model.config.mask_token_id
    for text in (f"a {tokenizer.mask_token}{tokenizer.eos_token} b[MASK:2] {tokenizer.mask_token}",):
        ids = encode(text, tokenizer, mask, 1)
        assert ids.count(mask) == 2 and tokenizer.eos_token_id not in ids
        assert tokenizer.decode([i for i in ids if i != mask]) == text.replace("[MASK:2]", "")


def test_damaged_checkpoints_are_one_line(tiny_checkpoint, tmp_path, capsys):
    def damaged(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint, folder)
        change(folder)
        return str(folder)

    def configured(folder: Path, **values) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    cases = {
        damaged("torn", lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99)): "cannot be loaded",
        damaged("tokenizer", lambda f: (f / "tokenizer.json").write_text("{")): "cannot be loaded",
        damaged(
            "mask", lambda f: configured(f, mask_token_id=9999)
        ): "mask_token_id is 9999, the vocabulary has 0 to 384",
    }
    for folder, message in cases.items():
        assert main([folder, "--prompt", "x", "--length", "2"]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(error) == 1 and message in error[0]


@pytest.mark.slow
def test_watch_prints_each_step_and_compare_each_rule(checkpoint, capsys):
    assert main([checkpoint, "--infill", "The Fox [MASK:3] the river.", "--watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    masks = [line.split()[-3] for line in lines if line.endswith("masks left")]
    assert masks == ["2", "1", "0"] and "3 model calls   1.00 tokens a call   0 masks left" in lines[-2]
    rules = ["random", "threshold=0.5,cache=window"]
    assert main([checkpoint, "--infill", "The Fox [MASK:3] the river.", "--compare", *rules]) == 0
    table = capsys.readouterr().out
    assert "random" in table and "threshold" in table and "tokens a call" in table and "river" in table


@pytest.mark.parametrize("name", ["tiny", "llama2", "gpt2"])
def test_pieces_join_to_the_text(name, tokenizer):
    if name != "tiny":
        if not SHARED.exists():
            pytest.skip("the real tokenizers are not here")
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "data" / "tokenizers" / name)
    text = "There was a naïve 🦊 — “said” the 王 king.  Two  spaces\nand lines"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids) and "".join(found).strip() == text
    for end in range(len(ids)):  # also where a character is cut in the middle
        assert "".join(pieces(ids[:end], tokenizer)).strip() == tokenizer.decode(ids[:end]).strip()
    middle = pieces([*ids[:3], 9, 9, *ids[3:]], tokenizer, unknown=9)
    assert middle[:3] == found[:3] and middle[3:5] == ["░", "░"]
