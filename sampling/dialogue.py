"""A model in a conversation. It sees the same tokens as in training (data/tokens.py)."""

import sys
from typing import Any

import numpy as np

import common
from data.models import resolve_model
from data.tokens import Writer
from sampling.generate import generate, text_of
from training.record import run_of


class Speaker:
    """A model and its turns. Without a chat template (or with `template` none, here or in the run
    that saved the model) it has no turns: it continues the text.
    """

    policy: common.Policy  # to be set

    def __init__(self, name: str, flag: str, system: str | None = None, template: str = "auto"):
        resolve_model(name, flag)  # refuses a folder that holds no model
        self.name, self.tokenizer = name, common.load_tokenizer(name)
        off = "none" in (template, run_of(name).get("chat_template"))
        self.writer = Writer(self.tokenizer, raw=off, wrap=not off)
        if system and not self.writer.wrap:
            raise common.UserError(f"--system: {name} is used without a chat template")
        self.start = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict] = self.start

    def encode(self, prompt: str | list[dict]) -> np.ndarray:
        """Token ids up to the answer, with one BOS."""
        text = self.writer.texts_of({"prompt": prompt}, "prompt")["prompt_text"]
        ids, bos = self.writer.encode([text], None, lambda make: make())[text], self.tokenizer.bos
        while bos and ids[:1] == bos:  # the template wrote it
            ids = ids[1:]
        return np.array(bos + ids, np.int32)

    def answer(
        self, said: str | list[dict], run: common.Processes, most: int, **how: Any
    ) -> tuple[np.ndarray, np.ndarray, list[dict]]:
        """(tokens before the answer, tokens of the answer, the turns with both)."""
        if not (said if isinstance(said, list) else said.strip()):
            raise common.UserError("the prompt is empty")
        new = said if isinstance(said, list) else [{"role": "user", "content": said}]
        turns = [*self.turns, *new]
        ids = self.encode(turns if self.writer.wrap else said)
        limit = getattr(self.policy.config, "max_position_embeddings", None) or sys.maxsize
        if len(ids) >= limit:
            takes = f"{self.name} takes at most {limit:,}, its answer included"
            raise common.UserError(f"the prompt has {len(ids):,} tokens; {takes}")
        most, stops = min(most, limit - len(ids)), self.tokenizer.stop_ids
        response = generate(self.policy, [ids], stops, most, run=run, label=self.name, **how)[0]
        answer = {"role": "assistant", "content": text_of(response, self.tokenizer)}
        return ids, response, [*turns, answer] if self.writer.wrap else []

    def logp(self, ids: np.ndarray, response: np.ndarray, run: common.Processes) -> float:
        row = common.Row(ids, [response], ids)
        return common.compute_logps(self.policy, [row], [[0]], run, "log-probs").item()
