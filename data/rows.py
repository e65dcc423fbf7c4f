"""From a data set's name to rows of token ids: read, convert, apply the chat template, tokenise.

Prompt and responses are tokenised separately and joined as ids, so that the prompt has the same
tokens before every response. A sequence has one BOS (if the tokenizer writes one) and one EOS.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.kinds import LeftOut, convert, kind_of

TEST_ROWS = 2048  # of a data set's own test split: more take longer than the training
MANY_TEXTS = 100_000  # from here on, token ids are cached on disk
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
    from data.load import test_split

    train = read(args.dataset, "train", kind, tokenizer, args, make_row, from_main, **how)
    # One answer for all processes: it may depend on the network.
    test = args.eval_dataset or from_main(lambda: test_split(args.dataset, kind))
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
    args: Any,  # max_length, max_prompt_length, skip_bad_rows, cache_dir, pairs
    make_row: Callable[..., Any],  # common.Row
    main_first: Callable[[Callable], Any],  # calls a function on the main process, others wait
    whole_text: bool = False,  # demonstrations: train on the prompt too
    with_target: bool = False,  # pairs: the row's `target` is a third response
) -> list:
    """Rows of token ids. Rows that cannot be used end the run, or are counted and left out."""
    counts, bad, texts, kinds = Counter(), [], [], Counter()
    for where, row in _raw_rows(dataset, split, kind, tokenizer, args):
        counts["read"] += 1
        if isinstance(row, LeftOut):
            counts[str(row)] += 1
            continue
        try:
            if isinstance(row, ValueError):
                raise row
            kinds[kind_of(row)] += 1
            for new in convert(row, kind, getattr(args, "pairs", "best-worst"), with_target):
                if isinstance(new, LeftOut):
                    counts[str(new)] += 1
                    continue
                texts.append((where, *_texts_of(new, kind, tokenizer)))
        except ValueError as reason:
            bad.append(f"{where}: {reason}")
    ids = _encode(
        [t for _, prompt, rest, *_ in texts for t in (prompt, *rest)], tokenizer, args, main_first
    )
    rows, prompts = [], set()
    for where, *row_texts in texts:
        try:
            ready = _tokenise(*row_texts, ids, tokenizer, args, whole_text, counts)
        except ValueError as reason:
            bad.append(f"{where}: {reason}")
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
    if bad and not args.skip_bad_rows:
        more = [f"... and {len(bad) - 10:,} more"] if len(bad) > 10 else []
        raise ValueError(
            f"{len(bad):,} of {counts['read']:,} rows of {dataset} cannot be used "
            "(--skip-bad-rows leaves them out):\n  " + "\n  ".join(bad[:10] + more)
        )
    if not rows:
        raise ValueError(f"{dataset}: no usable row ({counts['read']:,} read, {len(bad):,} bad)")
    if bad:
        counts[f"bad ({bad[0]}{', ...' * (len(bad) > 1)})"] = len(bad)
    found = " and ".join(kinds)
    _report(
        rows, f"{split}: {dataset}: {counts.pop('read'):,} {found} rows", kind, counts, tokenizer
    )
    return rows


def _raw_rows(
    dataset: str, split: str, kind: str, tokenizer: Any, args: Any
) -> Iterator[tuple[str, Any]]:
    """(file:line, row, or why there is none)."""
    path = Path(dataset).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        yield from json_lines(path)
        return
    from data import load

    most = args.max_prompt_length - len(tokenizer.bos)

    def fits(prompt: str) -> bool:  # for published data sets that shorten their prompts
        short = prompt.isascii() and len(prompt) < most  # a token has at least one character
        return short or len(tokenizer(prompt, add_special_tokens=False).input_ids) <= most

    yield from load.read(dataset, split, kind, fits)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", parse_json(line)


def parse_json(line: bytes) -> dict | ValueError:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error.reason} at byte {error.start})")
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    if not isinstance(row, dict):
        return ValueError(f"a row must be an object, this is a {type(row).__name__}")
    return row


def _texts_of(row: dict, kind: str, tokenizer: Any) -> tuple[str, list[str], Any, bool]:
    """Prompt, responses, their scores, and whether the chat template wrote them."""
    scores = row.get("scores")
    if "responses" in row:
        responses = row["responses"]
    elif kind == "pair":
        responses = [row[name] for name in ("chosen", "rejected", "target") if name in row]
    else:
        responses = [row["completion"]] if "completion" in row else []
        scores = [float(row["label"])] if kind == "labelled" else None
    prompt, templated = row["prompt"], isinstance(row["prompt"], list)
    if any(isinstance(response, list) != templated for response in responses):
        raise ValueError("prompt and responses must all be texts or all be lists of messages")
    if templated:
        prompt, responses = _render(prompt, responses, tokenizer)
    for text in (prompt, *responses):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half a character (a lone surrogate)") from None
    return prompt, responses, scores, templated


def _render(prompt: list, responses: list, tokenizer: Any) -> tuple[str, list[str]]:
    """Messages as text: what the chat template writes before an answer, and adds for each."""
    if not tokenizer.chat_template:
        raise ValueError("a list of messages, but this model's tokenizer has no chat template")

    def render(messages: list, **more: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception as error:  # a template may raise anything ("System role not supported")
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template refuses it: {reason[:200]}") from None

    full = [render(prompt + response) for response in responses]
    for start in (render(prompt, add_generation_prompt=True), render(prompt)):
        if all(text.startswith(start) for text in full):
            return start, [text[len(start) :] for text in full]
    raise ValueError("the chat template does not begin an answer as it begins one to be generated")


def _encode(texts: list[str], tokenizer: Any, args: Any, main_first: Callable) -> dict:
    """Token ids by text, without special tokens. Those of large sets are cached on disk."""
    texts, ids = list(dict.fromkeys(texts)), {}
    if len(texts) >= MANY_TEXTS:
        from data import tokens

        folder = Path(args.cache_dir or "runs/.cache").expanduser()
        make = partial(tokens.encode, texts, tokenizer, folder)
        main_first(lambda: make() and None)  # writes the cache, which the others read
        return dict(zip(texts, make(), strict=True))
    for start in range(0, len(texts), 2000):
        chunk = texts[start : start + 2000]
        ids |= zip(chunk, tokenizer(chunk, add_special_tokens=False).input_ids, strict=True)
    return ids


def _tokenise(
    prompt_text: str,
    response_texts: list[str],
    scores: list[float] | None,
    templated: bool,
    ids: dict[str, list[int]],
    tokenizer: Any,
    args: Any,
    whole_text: bool,
    counts: Counter,
) -> dict | None:
    prompt = ids[prompt_text]
    while tokenizer.bos and prompt[:1] == tokenizer.bos:  # written out in the text
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
    key = hashlib.sha256((prompt_text or response_texts[0]).encode()).digest()[:8]
    array = partial(np.array, dtype=np.int32)
    return {
        "prompt": array(prompt), "responses": list(map(array, responses)),
        "question": array(question), "key": key,
        "scores": None if scores is None else np.array(scores, np.float64),
    }  # fmt: skip


def cut_prompt(prompt: Any, length: int, tokenizer: Any) -> Any:
    """Of a prompt (list or array) that is too long, keep BOS and the end: there is the question."""
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


def _report(rows: list, source: str, kind: str, counts: Counter, tokenizer: Any) -> None:
    """What became of the rows, their lengths, and the first one."""
    cut = [f"{counts.pop(f'{part} cut', 0):,} {part}" for part in ("prompts", "responses")]
    left_out = ", ".join(f"{n:,} {why}" for why, n in counts.items() if n) or "none"
    log.info(f"{source} -> {len(rows):,} {kind} rows; left out: {left_out}")
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
