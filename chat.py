"""Talk to a model, or to two of them next to each other.

    python chat.py --model runs/dpo --against runs/sft                # prompts from the keyboard
    python chat.py "Why is the sky blue?" --model runs/dpo --temperature 0
    python chat.py --model runs/dpo --file prompts.txt                # or .jsonl, or from a pipe

A model with a chat template answers in turns and remembers the conversation. Any other model
continues the text. At the keyboard, Ctrl-C stops an answer, /new starts another conversation, and
/quit or Ctrl-D ends.

Each answer comes with its tokens (end-of-sequence included), whether it ended, and its log-prob at
temperature 1: the sum over its tokens, and per token. With --against also by how much the log-prob
is above that of the other model, in the same conversation. For a model trained with a reference,
and that reference, beta times this log-ratio is the implicit reward of the answer (dpo.py).

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13, transformers 5.23.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import common
from data.kinds import convert, rename
from data.load import READERS, read
from data.models import short_name
from family.task import test_prompts
from sampling.dialogue import Speaker
from sampling.generate import text_of
from sampling.show import end_of, show


@dataclass
class Args:
    # One or several; default: those of --file or of a pipe, else from the keyboard.
    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT ...")] = ()
    model: str = "tiny"  # a folder (runs/dpo), a short name (gemma-2-2b), or a Hugging Face id
    against: str | None = None  # another model, which answers the same prompts
    file: str | None = None  # a prompt a line; or rows with a `prompt`: .jsonl, .parquet, ...
    system: str | None = None  # system prompt, for models with a chat template
    chat_template: Literal["auto", "none"] = "auto"  # none: continue the text in any case
    temperature: float = 0.7  # 0: greedy
    top_k: int = 0  # draw from the k most likely tokens only; 0: from all
    max_new_tokens: int = 256  # per answer
    seed: int = 0  # of both models' samples
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # default: bfloat16 on GPUs


def prompts_of(args: Args) -> list[str | list[dict]] | None:
    """From the command line, --file or a pipe. None: from the keyboard."""
    if args.prompt or not args.file and sys.stdin.isatty():
        return list(args.prompt) or None
    path, source, prompts = Path(args.file or "").expanduser(), args.file or "the pipe", []
    if source.endswith(tuple(READERS)):
        for where, row in read(source, "train", "prompt"):
            try:
                if isinstance(row, ValueError):
                    raise row
                prompts += [new["prompt"] for new in convert(rename(row, {}), "prompt")]
            except ValueError as reason:
                raise common.UserError(f"{where}: {reason}") from None
    elif args.file and not path.is_file():
        raise common.UserError(f"--file {args.file}: there is no such file")
    else:
        data = path.read_bytes() if args.file else sys.stdin.buffer.read()
        try:
            prompts = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise common.UserError(f"{source}: not UTF-8, at byte {error.start}") from None
    if not prompts:
        raise common.UserError(f"{source} has no prompt: python chat.py --help")
    return prompts


class Chat:
    """One model or two, and what they are asked."""

    def __init__(self, args: Args):
        self.args, self.run, self.asked = args, common.Processes(), 0
        args.share_prompt = False  # a prompt has one answer
        names = {"--model": args.model} | ({"--against": args.against} if args.against else {})
        self.speakers = [Speaker(x, at, args.system, args.chat_template) for at, x in names.items()]
        first, last = (self.speakers[i].tokenizer.get_vocab() for i in (0, -1))
        self.comparable = first == last
        if not self.comparable:
            common.say("tokenizers", "two different ones: there are no log-ratios")
        for flag, who in zip(names, self.speakers, strict=True):
            who.policy = common.load_policy(args, self.run, who.name, flag[2:], frozen=True)

    def ask(self, prompt: str | list[dict]) -> None:
        args, answers, turns = self.args, [], []
        how = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
        how |= {"most": args.max_new_tokens, "first": self.asked}
        for speaker, other in zip(self.speakers, self.speakers[::-1], strict=True):
            ids, y, with_answer = speaker.answer(prompt, self.run, **how)
            turns.append(with_answer)
            ended = "ended" if int(y[-1]) in speaker.tokenizer.stop_ids else "not ended"
            total, n = speaker.logp(ids, y, self.run), len(y)
            facts = f"{n} tokens, {ended}, log-prob {total:.2f} ({total / n:.3f} per token)"
            if other is not speaker and self.comparable:
                ratio = total - other.logp(ids, y, self.run)
                facts += f", log-ratio to {other.name} {ratio:+.2f}"
            answers.append((speaker.name, facts, text_of(y, speaker.tokenizer)))
        show(answers)
        self.asked += 1
        for speaker, with_answer in zip(self.speakers, turns, strict=True):
            speaker.turns = with_answer

    def forget(self) -> None:
        for speaker in self.speakers:
            speaker.turns = speaker.start

    def talk(self) -> None:
        """Prompts from the keyboard."""
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys
        with suppress(EOFError):
            while (prompt := input("\n> ")).strip() != "/quit":
                try:
                    self.forget() if prompt.strip() == "/new" else self.ask(prompt)
                except common.UserError as error:
                    print(f"error: {error}")
                except SystemExit as error:
                    if error.code != 130:  # Ctrl-C (training/parallel.py)
                        raise
                    print("stopped")


def main(args: Args) -> None:
    if not args.temperature >= 0 or args.max_new_tokens < 1:
        raise common.UserError("--temperature must be 0 or more, --max-new-tokens 1 or more")
    prompts, chat = prompts_of(args), Chat(args)
    if prompts is None:
        if short_name(args.model) == "tiny":
            common.say("example", f"it knows one task: {min(test_prompts(99), key=len)}")
        common.say("", "type a prompt; /new starts another conversation, /quit or Ctrl-D ends")
        return chat.talk()
    for prompt in prompts:
        print(f"\n> {end_of(str(prompt))}")
        chat.forget()
        chat.ask(prompt)


if __name__ == "__main__":
    main(common.parse(Args, {}, __doc__))
