"""From a data set's name to rows of token ids: read, convert, tokenise, cut (texts: tokens.py).

Prompt and responses are tokenised separately and joined as ids, so that the prompt has the same
tokens before every response. A sequence has one BOS (if the tokenizer writes one) and one EOS.
"""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from data import load as sources
from data.kinds import KINDS, LeftOut, convert, kind_of, rename
from data.tokens import Writer

TEST_ROWS = 2048  # of a data set's own test split: more take longer than the training
log = logging.getLogger("plainpref")


def load(
    args: Any,
    tokenizer: Any,
    kind: str,
    make_row: Callable[..., Any],
    from_main: Callable[[Callable], Any],
    **how: bool,
) -> tuple[list, list]:
    """Training and held-out rows."""
    train = read(args.dataset, "train", kind, tokenizer, args, make_row, from_main, **how)
    # One answer for all processes: it may depend on the network.
    test = args.eval_dataset or from_main(lambda: sources.test_split(args.dataset, kind))
    if test:
        held_out = read(test, "test", kind, tokenizer, args, make_row, from_main, **how)
        held_out, _ = split_rows(held_out, len(held_out) if args.eval_dataset else TEST_ROWS)
    else:
        held_out, train = split_rows(train, min(512, len(train) // 20))
    log.info(f"held out: {len(held_out):,} rows (choose others with --eval-dataset)")
    return train, held_out


def split_rows(rows: list, most: int) -> tuple[list, list]:
    """Split off `most` rows by a hash of the prompt, so that equal prompts stay together."""
    border = [*sorted(row.key for row in rows), b"\xff" * 9][min(most, len(rows))]
    return [row for row in rows if row.key < border], [row for row in rows if row.key >= border]


def read(
    dataset: str,
    split: str,
    kind: str,  # pair, ranked, labelled, demonstration or prompt
    tokenizer: Any,
    args: Any,  # max_length, max_prompt_length, skip_bad_rows, cache_dir, pairs, columns, ...
    make_row: Callable[..., Any],  # common.Row
    main_first: Callable[[Callable], Any],  # calls a function on the main process, others wait
    whole_text: bool = False,  # demonstrations: train on the prompt too
    with_target: bool = False,  # pairs: the row's `target` is a third response
) -> list:
    """Rows of token ids. Unusable rows stop the run, or are left out and counted."""
    theirs = parse_columns(getattr(args, "columns", None))
    # The embedded task holds samples as its model wrote them, special tokens included.
    raw = getattr(args, "chat_template", "auto") == "none" or dataset.split(":")[0] == "family"
    writer = Writer(tokenizer, raw, wrap=not raw and not sources.find_published(dataset, kind))
    counts, kinds, texts = Counter(), Counter(), []
    bad: dict[str, list[str]] = {}  # reason -> where
    most = args.max_prompt_length - len(tokenizer.bos)

    def fits(prompt: str) -> bool:  # for published data sets that shorten their prompts
        short = prompt.isascii() and len(prompt) < most  # a token has at least one character
        return short or len(tokenizer(prompt, add_special_tokens=False).input_ids) <= most

    for where, row in sources.read(dataset, split, kind, fits):
        counts["read"] += 1
        if isinstance(row, LeftOut):
            counts[str(row)] += 1
            continue
        try:
            if isinstance(row, ValueError):
                raise row
            row = rename(row, theirs)
            made = convert(row, kind, getattr(args, "pairs", "best-worst"), with_target)
            kinds[kind_of(row, kind)] += 1
            for new in made:
                if isinstance(new, LeftOut):
                    counts[str(new)] += 1
                else:
                    texts.append((where, writer.texts_of(new, kind)))
        except ValueError as reason:
            bad.setdefault(printable(reason), []).append(where)
    every = [t for _, row in texts for t in (row["prompt_text"], *row["response_texts"])]
    ids = writer.encode(every, args.cache_dir, main_first)
    rows, prompts = [], set()
    for where, row_texts in texts:
        try:
            ready = _tokenise(**row_texts, ids=ids, tokenizer=tokenizer, args=args,
                              whole_text=whole_text, counts=counts)  # fmt: skip
        except ValueError as reason:
            bad.setdefault(printable(reason), []).append(where)
            continue
        if ready is None or (kind == "prompt" and ready["key"] in prompts):
            counts["repeated prompts"] += ready is not None
            continue
        prompts.add(ready["key"])
        if kind == "labelled":  # one row per answer; cut together, so both have the same prompt
            for k, response in enumerate(ready["responses"]):
                one = {"responses": [response], "scores": ready["scores"][k : k + 1]}
                rows.append(make_row(**ready | one))
        else:
            rows.append(make_row(**ready))
    total = counts.pop("read", 0)
    num_bad = len({where for places in bad.values() for where in places})
    if bad and (not rows or not args.skip_bad_rows):
        raise ValueError(_refusal(dataset, bad, num_bad, total))
    cut = [f"{counts.pop(f'{part} cut', 0):,} {part}" for part in ("prompts", "responses")]
    if bad:
        reason, places = next(iter(bad.items()))
        counts[f"bad ({places[0]}: {reason}{', ...' * (num_bad > 1)})"] = num_bad
    left_out = ", ".join(f"{n:,} {why}" for why, n in counts.items() if n) or "none"
    if not rows:
        raise ValueError(f"{dataset}: no usable row ({total:,} read; left out: {left_out})")
    source = f"{split}: {dataset}: {total:,} {' and '.join(kinds)} rows"
    log.info(f"{source} -> {len(rows):,} {kind} rows; left out: {left_out}")
    _report(rows, kind, cut, writer)
    return rows


def parse_columns(columns: str | None) -> dict[str, str]:
    """{ours: theirs} of --columns ours=theirs,..."""
    known = {name for names in KINDS.values() for name in names} | {"target"}
    parts = [part.partition("=") for part in (columns or "").split(",") if part.strip()]
    theirs = {ours.strip(): name.strip() for ours, _, name in parts}
    if not all(theirs.values()) or not theirs.keys() <= known:
        names = ", ".join(sorted(known))
        raise ValueError(f"--columns {columns}: must be OURS=THEIRS,... where OURS is of {names}")
    return theirs


def printable(reason: ValueError) -> str:
    """One line: a name or a text from the rows may hold line breaks or control characters."""
    text = str(reason)[:1000]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _refusal(dataset: str, bad: dict[str, list[str]], num_bad: int, total: int) -> str:
    """How many rows are bad, why, and where: equal reasons together."""
    advice = " (--skip-bad-rows leaves them out)" if num_bad < total else ""
    lines = [f"{num_bad:,} of {total:,} rows of {dataset} cannot be used{advice}:"]
    for reason, places in sorted(bad.items(), key=lambda entry: -len(entry[1]))[:10]:
        first = ", ".join(places[:3])
        many = f"{len(places):,} of {total:,} rows: {reason}; first: {first}"
        lines.append(many if len(places) > 1 else f"{first}: {reason}")
    more = [f"... and {len(bad) - 10:,} more reasons"] if len(bad) > 10 else []
    return "\n  ".join(lines + more)


def _tokenise(
    prompt_text: str,
    response_texts: list[str],
    scores: list[float] | None,
    templated: bool,
    key: bytes,
    ids: dict[str, list[int]],
    tokenizer: Any,
    args: Any,
    whole_text: bool,
    counts: Counter,
) -> dict | None:
    prompt = ids[prompt_text]
    while tokenizer.bos and prompt[:1] == tokenizer.bos:  # written by the template or in a raw text
        prompt = prompt[1:]
    prompt = tokenizer.bos + prompt
    responses = [_end_with_eos(ids[text], tokenizer, templated) for text in response_texts]
    if not prompt and len(responses) != 1:
        raise ValueError("the prompt is empty, and this tokenizer has no BOS to begin with")
    longest = max(map(len, responses), default=args.max_length)  # none yet: keep room for one
    if len(prompt) + longest > args.max_length:
        if len(prompt) > args.max_prompt_length:
            counts["prompts cut"] += 1
            prompt = cut_prompt(prompt, args.max_prompt_length, tokenizer)
        room = args.max_length - len(prompt)
        counts["responses cut"] += sum(len(response) > room for response in responses)
        responses = [response[:room] for response in responses]  # no EOS: it did not end there
    question = prompt
    if whole_text or not prompt:  # nothing comes before the first token to predict it from
        prompt, responses = (prompt + responses[0])[:1], [(prompt + responses[0])[1:]]
    if not all(responses):
        raise ValueError("an answer without tokens")
    if len(responses) > 1:
        # Of ranked responses that cutting made equal, the best stays. A pair must differ.
        first = {tuple(response): k for k, response in reversed(list(enumerate(responses)))}
        if scores:
            distinct = sorted(first.values())
            counts["responses equal after cutting"] += len(responses) - len(distinct)
            responses, scores = [responses[k] for k in distinct], [scores[k] for k in distinct]
        if scores[0] == scores[-1] if scores else responses[0] == responses[1]:
            counts["equal after cutting"] += 1
            return None
    array = partial(np.array, dtype=np.int32)
    return {
        "prompt": array(prompt), "responses": list(map(array, responses)),
        "question": array(question), "key": key,
        "scores": None if scores is None else np.array(scores, np.float64),
    }  # fmt: skip


def cut_prompt(prompt: Any, length: int, tokenizer: Any) -> Any:
    """Cut a prompt (list or array) that is too long: keep BOS, and its end with the question."""
    start, rest = len(tokenizer.bos), len(prompt) - length + len(tokenizer.bos)
    if len(prompt) <= length:
        return prompt
    if isinstance(prompt, list):
        return prompt[:start] + prompt[rest:]
    return np.concatenate([prompt[:start], prompt[rest:]])


def _end_with_eos(ids: list[int], tokenizer: Any, templated: bool) -> list[int]:
    """End a response once: with the template's own end, else with EOS."""
    ends = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    if not ends:
        return [*ids, tokenizer.eos_token_id]
    rest = [token for token in ids[ends[0] :] if token not in tokenizer.stop_ids]
    continues = bool(rest) and bool(tokenizer.decode(rest).strip())
    if continues and not templated:
        raise ValueError("an end-of-sequence token in the middle of a response")
    return ids[: (ends[-1] if continues else ends[0]) + 1]  # of several turns, the last one's end


def _report(rows: list, kind: str, cut: list[str], writer: Writer) -> None:
    """Lengths, what became of texts, the first row; a warning for rows that teach something bad."""
    tokenizer, seen = writer.tokenizer, writer.seen
    responses = [response for row in rows for response in row.responses]
    lengths = [("prompt", [len(row.prompt) for row in rows])]
    lengths += [("response", [len(response) for response in responses])] if responses else []
    shown = [
        f"{name} {'/'.join(f'{q:.0f}' for q in np.quantile(n, (0.5, 0.95, 1)))}"
        for name, n in lengths
    ]
    ended = ""
    if responses:
        share = np.mean([int(response[-1]) in tokenizer.stop_ids for response in responses])
        ended = f"; {share:.1%} of responses end with EOS"
    cut = " and ".join(cut if responses else cut[:1])
    log.info(f"tokens (median/95 %/max): {', '.join(shown)}; {cut} cut{ended}")
    texts = [tokenizer.decode(ids) for ids in (rows[0].prompt, *rows[0].responses)]
    texts = [text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}" for text in texts]
    log.info(f"first row: {' | '.join(map(repr, texts))}")
    if seen["wrapped"]:
        turns = "texts are wrapped as user and assistant turns"
        log.info(f"chat template: {turns} (--chat-template none: as they are)")
    elif tokenizer.chat_template and seen["as they are"]:
        log.info("chat template: texts are used as they are, without it")
    if seen["special"]:
        where = f"special tokens that {seen['special']:,} rows spell out"
        log.info(f"{where} are encoded as plain text (--chat-template none: as special tokens)")
    if kind == "ranked":
        gap = np.median([row.scores[0] - row.scores[-1] for row in rows])
        log.info(f"scores: the median gap between best and worst is {gap:.3g}")
    ended = [int(row.responses[0][-1]) in tokenizer.stop_ids for row in rows if responses]
    if responses and np.mean(ended) < 2 / 3:
        which = "answers" if len(rows[0].responses) == 1 else "chosen answers"
        how = "a model does not learn from them to stop: raise --max-length"
        log.warning(f"warning: {1 - np.mean(ended):.0%} of the {which} are cut; {how}")
    if seen["dialogues"]:
        what = "dialogues that differ before the last answer"
        how = "all turns after the first difference are trained on as the answer"
        log.warning(f"warning: {seen['dialogues']:,} rows hold {what}; {how}")
    if kind == "labelled" and len(labels := {bool(row.scores[0] > 0) for row in rows}) == 1:
        log.warning(
            f"warning: all labels are {str(*labels).lower()}; answers of both kinds are needed"
        )
