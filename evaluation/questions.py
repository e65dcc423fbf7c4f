"""The questions and pairs that a model is measured on: rows that its training held out."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np

import common
from data.load import test_split
from data.rows import cut_prompt, read, split_rows
from training.record import run_of

# The kind of rows that a method reads, if it is not "pair".
READ_AS = {"sft": "demonstration", "kto": "labelled"}
READ_AS |= dict.fromkeys(("listwise_dpo", "pro", "rrhf"), "ranked")
READ_AS |= dict.fromkeys(("raft", "rso", "ppo", "nlpo", "rloo", "grpo"), "prompt")


def load_questions(
    args: Any, tokenizer: Any, with_responses: bool
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """At most --prompts distinct prompts, and the data set's responses to them."""
    source = args.eval_dataset or args.dataset
    kind = "demonstration" if with_responses else "prompt"
    if source.split(":")[0] == "family":
        kind = "pair"  # its demonstrations are dialogues
        if source == "family" and not with_responses:
            from family.task import test_prompts

            ids = (tokenizer(text).input_ids for text in test_prompts(args.prompts))
            common.say("questions", f"{args.prompts:,} of the embedded task, unseen in training")
            return [np.array(x, np.int32) for x in ids], None
    distinct: dict[bytes, common.Row] = {}
    for row in load_rows(args, kind, tokenizer):
        distinct.setdefault(row.key, row)
    rows, _ = split_rows(list(distinct.values()), args.prompts)
    prompts = [cut_prompt(row.question, args.max_prompt_length, tokenizer) for row in rows]
    return prompts, [row.responses[0] for row in rows] if with_responses else None


def load_pairs(args: Any, tokenizer: Any) -> list[common.Row]:
    logging.disable(logging.INFO)  # the report on these rows was printed with the questions
    try:
        return split_rows(load_rows(args, "pair", tokenizer), args.prompts)[0]
    except ValueError as error:
        common.say("ranking", f"skipped, there are no pairs: {str(error).splitlines()[0]}")
        return []
    finally:
        logging.disable(logging.NOTSET)


def load_rows(args: Any, kind: str, tokenizer: Any) -> list[common.Row]:
    test = args.eval_dataset or common.from_main(lambda: test_split(args.dataset, kind))
    if test:
        return read(test, "test", kind, tokenizer, args, common.Row, common.from_main)
    rows, run = common.load_rows(args, tokenizer, kind)[1], run_of(args.model)
    if run.get("dataset") == args.dataset:
        # How many rows are held out depends on their kind and length, so the run may have learned
        # from some of these. Keep the prompts that it held out itself.
        lengths = {name: run[name] for name in ("max_length", "max_prompt_length")}
        its_kind = READ_AS.get(run["script"], "pair")
        logging.disable(logging.INFO)  # no second report
        unseen = common.load_rows(replace(args, **lengths), tokenizer, its_kind)[1]
        logging.disable(logging.NOTSET)
        keys = {row.key for row in unseen}
        rows = [row for row in rows if row.key in keys]
    return rows
