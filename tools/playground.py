"""A page to watch a diffusion model write: type a text with gaps, choose how to decode, see each step.

    python -m tools.playground exports/demo
    python -m tools.playground exports/demo --base runs/base/SmolLM2-135M-Instruct --port 7861

[MASK:n] stands for n unknown tokens; a text without one is continued. Tokens are coloured by the model's confidence
or by the step that found them; afterwards a slider goes back through the steps. With --base the autoregressive model
writes the same beside it. The page is served to this machine alone (127.0.0.1), unless --host says otherwise.
"""

import html
import os
import sys
import time
from collections.abc import Iterator
from threading import Event, Lock, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from common.cli import command, make_parser
from common.errors import UserError
from pretrain.model.rules import ORDERS

from .animation import COLOURS, CSS, Film, legend, render
from .decoding import GAP, Request, gap_lengths, load, request, settings_of

EXAMPLES = [
    "Once upon a time there was a [MASK:6] who lived in a castle with her father the king.",
    "The youngest son went into the forest, and there he [MASK:10] under a tree.",
    "Once upon a time",
]
USERS = 2  # who are served at a time; others wait in a queue and see their place
RULES = ("none", "threshold", "factor", "entropy_bound")
UNSET = {  # controls in which 0 means none, and whether they hold whole numbers
    "steps": True, "block_length": True, "top_k": True, "refresh_every": True, "top_p": False, "min_p": False,
    "repetition_penalty": False, "kl_threshold": False, "verify_threshold": False, "remasking": False,
}  # fmt: skip


class Writer:
    """Answers the page: each call is apart from the others, so several users may write at a time."""

    def __init__(self, model: Any, tokenizer: Any, base: Any = None, base_tokenizer: Any = None, most: int = 512):
        self.model, self.tokenizer, self.most = model, tokenizer, most
        self.base, self.base_tokenizer = base, base_tokenizer
        self.base_is_free = Lock()  # transformers' generate draws from torch's one generator

    def asked(self, text: str, length: int) -> Request:
        """Raises UserError for a text that cannot be filled."""
        if len(text) > 40 * self.most:
            raise UserError(f"{len(text):,} characters are more than this page takes ({40 * self.most:,}); shorten it")
        if not GAP.search(text):
            text = f"{text}[MASK:{length}]"
        wanted = sum(gap_lengths(text))
        if wanted > self.most:
            raise UserError(f"{wanted} tokens in gaps are more than this page writes at a time ({self.most})")
        return request(text, self.model, self.tokenizer)

    def write(self, text: str, length: int, seed: int, colour: str, **given: Any) -> Iterator[tuple[str, str, Film]]:
        """(HTML of the text, of the facts, film so far) after each step. Raises UserError for what the user can fix."""
        asked = self.asked(text, length)
        settings = settings_of(self.model, given)
        film = Film(asked.ids, self.tokenizer, self.model.config.mask_token_id)
        states = self.model.diffusion_states(
            torch.tensor([asked.ids], device=self.model.device), generator=asked.generator(seed), **vars(settings)
        )
        total = settings.steps or asked.ids.count(self.model.config.mask_token_id)  # for the colours of steps
        yield render(film.frames[0], colour, total), facts(0, 0, 0.0), film
        spent, began = 0.0, time.perf_counter()  # of decoding, without drawing
        for state in states:
            spent += time.perf_counter() - began
            frame = film.add(state)
            yield render(frame, colour, total), facts(frame.found, frame.calls, spent), film
            began = time.perf_counter()
        frame = film.frames[-1]
        yield render(frame, colour, len(film.frames) - 1), facts(frame.found, frame.calls, spent), film

    def write_with_base(self, text: str, length: int, seed: int, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(HTML of the text, of the facts) of the AR model, which continues what stands before the first gap."""
        prompt = GAP.split(text)[0]
        count = sum(gap_lengths(text)) or length
        ids = self._base_ids(prompt, count)
        stopped = Event()
        streamer = _Counting(self.base_tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        sampling: dict[str, Any] = {name: given[name] for name in names if given.get(name)}
        sampling["do_sample"] = given.get("temperature") != 0
        failed: list[Exception] = []

        def run() -> None:
            with self.base_is_free:
                torch.manual_seed(seed)
                try:
                    self.base.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=count,
                        pad_token_id=0,
                        streamer=streamer,
                        stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), stopped.is_set())],
                        **sampling,
                    )
                except Exception as error:  # of a library's thread: shown on the page, not lost
                    failed.append(error)
                    streamer.end()

        Thread(target=run, daemon=True).start()
        began, written = time.perf_counter(), ""
        try:
            for piece in streamer:
                written += piece
                yield _plain(prompt, written), facts(streamer.count, streamer.count, time.perf_counter() - began)
        finally:  # the page may have been closed, or Stop pressed
            stopped.set()
        if failed:
            raise UserError(f"the base model failed: {failed[0]}")
        line = facts(streamer.count, streamer.count, time.perf_counter() - began)
        between = GAP.split(text)[2::2]
        yield _plain(prompt, written), line + (NO_INFILLING if any(part.strip() for part in between) else "")

    def _base_ids(self, prompt: str, count: int) -> torch.Tensor:
        """(1, L) ids of a prompt for the AR model. Raises UserError for one that it cannot begin with."""
        ids = self.base_tokenizer(prompt, split_special_tokens=True)["input_ids"] if prompt else []
        starts = [self.base_tokenizer.bos_token_id, self.base_tokenizer.eos_token_id]
        ids = ids or [token for token in starts if token is not None][:1]
        if not ids:
            raise UserError("the base model has no start token; begin the text with a word")
        limit = getattr(self.base.config, "max_position_embeddings", None)
        if limit and len(ids) + count > limit:
            raise UserError(f"{len(ids) + count} tokens, but the base model takes {limit}")
        return torch.tensor([ids], device=self.base.device)


class _Counting(TextIteratorStreamer):
    """Counts the new tokens that it gets."""

    count = -1  # the first call brings the prompt

    def put(self, value: torch.Tensor) -> None:
        self.count += 1 if self.count < 0 else value.numel()
        super().put(value)


NO_INFILLING = "<div>It writes from left to right, and does not see what stands after a gap.</div>"


def _plain(prompt: str, written: str) -> str:
    return f'<div class="text"><span class="given">{html.escape(prompt)}</span>{html.escape(written)}</div>'.replace(
        "\n", "<br>"
    )


def facts(found: int, calls: int, seconds: float) -> str:
    """HTML: what has been written, and what it took."""
    speed = f"{found / seconds:.1f} tokens/s" if seconds else ""
    per_call = f"{found / calls:.2f} tokens a call" if calls else ""
    parts = [f"{found} tokens", f"{calls} model calls (NFE)", per_call, speed]
    return f'<div class="facts">{" · ".join(part for part in parts if part)}</div>'


def trouble(message: object) -> str:
    """HTML of an error: a sentence for the user."""
    return f'<div class="trouble">{html.escape(str(message))}</div>'


def chosen_settings(values: dict[str, Any]) -> dict[str, Any]:
    """SamplingSettings' names from the page's controls; what is 0 there is not set, whatever the defaults.

    Raises UserError for a control that was emptied.
    """
    for name in ("length", "seed", "temperature", "level", *UNSET):
        if values[name] is None:
            raise UserError(f"{name} is empty, expected a number")
        if abs(values[name]) > 1e9:
            raise UserError(f"{name} is {values[name]:g}, expected a number below 1e9")
    given: dict[str, Any] = {
        name: (int(values[name]) if whole else float(values[name])) or None for name, whole in UNSET.items()
    }
    given |= {"order": values["order"], "temperature": float(values["temperature"])}
    if values["rule"] != "none":
        given[values["rule"]] = values["level"]
    given["cache"] = "window" if values["cache"] else None
    return given


def build(writer: Writer, name: str, gradio: Any) -> Any:
    """The page, as Gradio blocks."""
    with gradio.Blocks(title=f"{name}: a diffusion language model", analytics_enabled=False) as page:
        film = gradio.State(None)
        gradio.Markdown(
            f"## {name}\nA text with gaps: `[MASK:8]` is eight unknown tokens. Without one, it is continued."
        )
        with gradio.Row():
            with gradio.Column(scale=2):
                text = gradio.Textbox(EXAMPLES[0], label="Text", lines=3, elem_id="prompt")
                gradio.Examples([[example] for example in EXAMPLES], [text])
                controls = _controls(gradio, writer.most)
                with gradio.Row():
                    go = gradio.Button("Write", variant="primary", elem_id="write")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column(scale=3):
                colour = gradio.Radio(list(COLOURS), value=COLOURS[0], label="Colour by", elem_id="colour")
                key = gradio.HTML(legend(COLOURS[0]))
                shown = gradio.HTML('<div class="text"></div>', elem_id="shown")
                said = gradio.HTML(facts(0, 0, 0.0), elem_id="facts")
                step = gradio.Slider(0, 1, value=0, step=1, label="Step", interactive=True, elem_id="step")
                if writer.base is not None:
                    gradio.Markdown("**The autoregressive base**, from left to right")
                other = gradio.HTML("", elem_id="base", visible=writer.base is not None)
                other_said = gradio.HTML("", elem_id="base_facts", visible=writer.base is not None)

        names = list(controls)

        def run(text_: str, colour_: str, *values: Any) -> Iterator[tuple]:
            found = dict(zip(names, values))
            same = gradio.skip()
            try:
                given = chosen_settings(found)
                length, seed = int(found["length"]), int(found["seed"])
                for body, line, film_ in writer.write(text_, length, seed, colour_, **given):
                    last = len(film_.frames) - 1
                    yield body, line, film_, gradio.Slider(maximum=max(1, last), value=last), same, same
                if writer.base is not None:
                    for body, line in writer.write_with_base(text_, length, seed, given):
                        yield same, same, same, same, body, line
            except (UserError, ValueError, RuntimeError) as error:
                yield same, trouble(error), same, same, same, same

        def look(film_: Film | None, number: int, colour_: str) -> tuple:
            if film_ is None:
                return gradio.skip(), legend(colour_)
            frame = film_.frames[min(int(number), len(film_.frames) - 1)]
            return render(frame, colour_, len(film_.frames) - 1), legend(colour_)

        inputs, outputs = [text, colour, *controls.values()], [shown, said, film, step, other, other_said]
        began = go.click(run, inputs, outputs, concurrency_limit=USERS, show_progress="hidden")
        stop.click(None, cancels=[began])
        for change in (step.input, colour.change):
            change(look, [film, step, colour], [shown, key], show_progress="hidden", queue=False)
    return page


def _controls(gradio: Any, most: int) -> dict[str, Any]:
    """The page's inputs by name."""
    found: dict[str, Any] = {}
    with gradio.Row():
        found["length"] = gradio.Slider(1, most, value=48, step=1, label="New tokens", info="for a text without a gap")
        found["seed"] = gradio.Number(0, label="Seed", precision=0)
    with gradio.Row():
        found["order"] = gradio.Dropdown(list(ORDERS), value="left_to_right", label="Order", elem_id="order")
        found["temperature"] = gradio.Slider(
            0, 2, value=0.7, step=0.05, label="Temperature", info="0: the likeliest", elem_id="temperature"
        )
    with gradio.Row():
        found["steps"] = gradio.Number(0, label="Steps", info="0: one a token", precision=0, elem_id="steps")
        found["block_length"] = gradio.Number(0, label="Block length", info="0: one block", precision=0)
    with gradio.Accordion("More than one token a step, second thoughts, filters", open=False):
        with gradio.Row():
            found["rule"] = gradio.Dropdown(list(RULES), value="none", label="Adaptive rule", elem_id="rule")
            found["level"] = gradio.Number(0.9, label="Its level", info="probability, factor or nats")
        with gradio.Row():
            found["kl_threshold"] = gradio.Number(0, label="Moved less than (KLASS)", info="nats; with a threshold")
            found["verify_threshold"] = gradio.Number(0, label="Verify below (WINO)", info="with a threshold")
            found["remasking"] = gradio.Number(0, label="Remasking", info="a probability")
        with gradio.Row():
            found["top_k"] = gradio.Number(0, label="Top k", info="0: all", precision=0)
            found["min_p"] = gradio.Number(0, label="Min p")
            found["repetition_penalty"] = gradio.Number(0, label="Repetition penalty", info="0: none; 1.2 is usual")
            found["top_p"] = gradio.Slider(0.05, 1, value=1.0, step=0.05, label="Top p")
        with gradio.Row():
            found["cache"] = gradio.Checkbox(False, label="Window cache", info="faster with blocks; an approximation")
            found["refresh_every"] = gradio.Number(0, label="Full pass every", info="steps of a block", precision=0)
    return found


def load_base(path: str, device: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of the AR model. Raises UserError where there is none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path).eval().to(device)
        return model, AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--base {path} cannot be loaded: {str(error).splitlines()[0]}") from None


@command
def main(argv: list[str] | None = None) -> int:
    """Serve the page until it is stopped; returns the exit code."""
    parser = make_parser("python -m tools.playground", __doc__)
    parser.add_argument("checkpoint", help="a folder written by tools.export, or a name on the Hub")
    parser.add_argument("--base", metavar="AR", help="an autoregressive model to write beside it")
    parser.add_argument("--port", type=int, help="default: the first that is free from 7860 on")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves it to the network; default: %(default)s")
    parser.add_argument("--max_tokens", type=int, default=512, help="the most that a user may ask for; %(default)s")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the checkpoint")
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens is {args.max_tokens}, expected at least 1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("the playground needs Gradio: pip install -e '.[playground]'") from None
    model, tokenizer = load(args.checkpoint, args.trust_remote_code)
    base = load_base(args.base, model.device) if args.base else (None, None)
    limit = getattr(model.config, "max_position_embeddings", None) or args.max_tokens
    writer = Writer(model, tokenizer, *base, most=min(args.max_tokens, limit - 1))
    page = build(writer, os.path.basename(os.path.normpath(args.checkpoint)), gradio)
    from gradio.themes import Default

    theme = Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    try:
        page.queue(max_size=64).launch(server_name=args.host, server_port=args.port, share=False, css=CSS, theme=theme)
    except OSError as error:
        raise UserError(f"port {args.port} cannot be used: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
