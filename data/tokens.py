"""From texts and messages to token ids: the chat template, and special tokens in texts.

If the tokenizer has a chat template, a text prompt is a user's turn and a text answer the
assistant's, so that texts and lists of messages give the same tokens. Special tokens that a text or
a message spells out (`<|im_end|>`, `</s>`) are encoded as the characters that they are made of. One
exception: an end-of-sequence token at the end of an answer that no template wraps is its end.
With `--chat-template none` texts are used as they are, special tokens included, as are those of the
embedded task. Texts of published sets are complete prompts, which are not wrapped.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MANY_TEXTS = 100_000  # from here on, token ids are cached on disk
MARK = "\udfff"  # put into special tokens: half a character, which no valid text has


class Writer:
    """Rows as texts that are ready to be tokenised. Where a text has a MARK, it is split there."""

    def __init__(self, tokenizer: Any, raw: bool, wrap: bool) -> None:
        self.tokenizer, self.raw, self.seen = tokenizer, raw, Counter()
        self.wrap = wrap and bool(tokenizer.chat_template)
        tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items() if len(t.content) > 1}
        self.stops = tuple(tokens[i].content for i in tokenizer.stop_ids if i in tokens)
        special = [t.content for t in tokens.values() if t.special] + [*self.stops]
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first) or "(?!)")

    def texts_of(self, row: dict, kind: str) -> dict:
        """Prompt, responses, scores, whether the chat template wrote them, and the prompt's key."""
        scores, prompt = row.get("scores"), row["prompt"]
        if "responses" in row:
            responses = row["responses"]
        elif kind == "pair":
            responses = [row[name] for name in ("chosen", "rejected", "target") if name in row]
        else:
            responses = [row["completion"]] if "completion" in row else []
            scores = [float(row["label"])] if kind == "labelled" else None
        lists = [part for part in (prompt, *responses) if isinstance(part, list)]
        templated = bool(lists) or self.wrap and prompt != ""  # it is empty if the row is a text
        if templated:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            responses = [
                [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
                for answer in responses
            ]
            self.seen["wrapped"] += not lists
            self.seen["dialogues"] += len(responses) > 1 and max(map(len, responses[:2])) > 1
            key = prompt[0]["content"] if [m["role"] for m in prompt] == ["user"] else ""
            prompt, responses = self.render(prompt, responses)
            key = key or prompt.replace(MARK, "")
        else:
            self.seen["as they are"] += prompt != ""
            key = prompt or responses[0]
            prompt, responses = self.plain(prompt), [*map(self.plain_answer, responses)]
        self.seen["special"] += any(MARK in text for text in (prompt, *responses))
        return {
            "prompt_text": prompt, "response_texts": responses, "scores": scores,
            "templated": templated, "key": hashlib.sha256(key.encode()).digest()[:8],
        }  # fmt: skip

    def plain(self, text: str) -> str:
        """Special tokens get a MARK after their first character."""
        return text if self.raw else self.special.sub(lambda m: m[0][0] + MARK + m[0][1:], text)

    def plain_answer(self, text: str) -> str:
        """The same, except for ends of sequence at the end."""
        answer = text.rstrip()
        while answer.endswith(self.stops):
            stop = next(stop for stop in self.stops if answer.endswith(stop))
            answer = answer.removesuffix(stop).rstrip()
        return self.plain(answer) + text[len(answer) :]

    def render(self, prompt: list, responses: list) -> tuple[str, list[str]]:
        """Messages as text: what the chat template writes before an answer, and adds for each."""
        if not self.tokenizer.chat_template:
            raise ValueError("a list of messages, but this model's tokenizer has no chat template")

        prompt, *responses = (
            [{name: self.plain(text) for name, text in message.items()} for message in part]
            for part in (prompt, *responses)
        )

        def write(messages: list, **more: bool) -> str:
            try:
                return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
            except Exception as error:  # a template may raise anything ("no system role")
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"the chat template refuses it: {reason[:200]}") from None

        full = [write(prompt + response) for response in responses]
        for start in (write(prompt, add_generation_prompt=True), write(prompt)):
            if all(text.startswith(start) for text in full):
                return start, [text[len(start) :] for text in full]
        raise ValueError(
            "the chat template does not begin an answer as it begins one to be generated"
        )

    def encode(self, texts: list[str], cache_dir: str | None, main_first: Callable) -> dict:
        """Token ids by text, without BOS and EOS. Those of large sets are cached on disk."""
        parts = list(dict.fromkeys(part for text in texts for part in text.split(MARK)))
        if len(parts) >= MANY_TEXTS:
            folder = Path(cache_dir or "runs/.cache").expanduser()
            make = partial(encode, parts, self.tokenizer, folder)
            main_first(lambda: make() and None)  # writes the cache, which the others read
            ids = dict(zip(parts, make(), strict=True))
        else:
            ids = {}
            for at in range(0, len(parts), 2000):
                chunk = parts[at : at + 2000]
                found = self.tokenizer(chunk, add_special_tokens=False).input_ids
                ids |= zip(chunk, found, strict=True)
        for text in texts:
            if MARK in text:
                ids[text] = [token for part in text.split(MARK) for token in ids[part]]
        return ids


def encode(texts: list[str], tokenizer: Any, cache_dir: Path) -> list[list[int]]:
    """Token ids of each text, without special tokens, from the cache if they are there.

    With several processes, call this on the main process first; the others then read its file.
    """
    import datasets
    import tokenizers

    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False).input_ids
    facts = (tokenizers.__version__, tokenizer.backend_tokenizer.to_str())
    digest = hashlib.sha256(str(tokenizer.split_special_tokens).encode())
    for text in (*facts, *texts):
        digest.update(f"{len(text)} {text}".encode())
    key = digest.hexdigest()[:24]
    ids = datasets.Sequence(datasets.Value("int32"))
    data = datasets.Dataset.from_dict({"text": texts}).map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False).input_ids},
        batched=True,
        remove_columns="text",
        features=datasets.Features({"ids": ids}),
        cache_file_name=str(cache_dir / f"tokens-{key}.arrow"),
        new_fingerprint=key,
        desc="tokens",
    )
    return data["ids"][:]
