"""Published data sets: where each is, and how its rows become ours.

Each function takes a published row and `fits` (is this text short enough for a prompt?). It returns
a row with the columns of kinds.KINDS, a list of rows, or a LeftOut with the reason, and leaves out
what the paper or its code leaves out. Prompts that were published as plain text end with a colon,
and responses begin with the space after it, so the prompt has the same last token without them.
"""

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.kinds import BadRow, LeftOut

Fits = Callable[[str], bool]


def columns(*names: str) -> Callable[[dict, Fits], dict]:
    return lambda row, fits: {name: row[name] for name in names}


def tldr_prompt(post: dict, fits: Fits) -> str:
    """A post that is too long loses lines at its end, as in the published code, so that "TL;DR:"
    stays. A single line loses letters.
    """

    def prompt(text: str) -> str:
        start = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}"
        return f"{start}\n\nPOST: {text}\n\nTL;DR:"

    text = post["post"]
    while not fits(prompt(text)):
        if "\n" not in text:
            too_long = range(1, len(text))
            length = bisect_left(too_long, True, key=lambda n: not fits(prompt(text[:n])))
            return prompt(text[:length])
        text = text[: text.rindex("\n")]
    return prompt(text)


def tldr_demonstration(row: dict, fits: Fits) -> dict:
    return {"prompt": tldr_prompt(row, fits), "completion": " " + row["summary"]}


def tldr_pair(row: dict, fits: Fits) -> dict | LeftOut:
    # Some held-out batches are about news articles, in another format.
    if "cnndm" in (row.get("batch") or "") or row["info"].get("post") is None:
        return LeftOut("about CNN/DM articles")
    if row["choice"] not in (0, 1) or isinstance(row["choice"], bool):
        raise BadRow(f"'choice' must be 0 or 1, this is {row['choice']!r}")
    better, worse = row["summaries"][row["choice"]], row["summaries"][1 - row["choice"]]
    prompt = tldr_prompt(row["info"], fits)
    return {"prompt": prompt, "chosen": better["text"], "rejected": worse["text"]}


def ultrafeedback_pair(row: dict, fits: Fits) -> dict | LeftOut:
    if row["score_chosen"] == row["score_rejected"]:
        return LeftOut("ties")
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def hh_pair(row: dict, fits: Fits) -> dict | LeftOut:
    """Dialogues stay texts, as in the DPO paper's code, so that any tokenizer will do."""
    prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
    other, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
    if not mark or prompt != other:
        return LeftOut("with different dialogues before the answer")
    return {"prompt": prompt + mark, "chosen": chosen, "rejected": rejected}


def shp_pair(row: dict, fits: Fits) -> dict | LeftOut:
    """Two comments on a post, with votes. The format and the filter are those of the DPO paper."""
    fewer, more = sorted((row["score_A"], row["score_B"]))
    if more < 2 * fewer:
        return LeftOut("with less than twice the votes")
    if row["labels"] not in (0, 1):
        raise BadRow(f"'labels' must be 0 or 1, this is {row['labels']!r}")
    better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
    return {
        "prompt": f"\n\nHuman: {row['history']}\n\nAssistant:",
        "chosen": " " + row[f"human_ref_{better}"],
        "rejected": " " + row[f"human_ref_{worse}"],
    }


LANGUAGES = {
    "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "ta": "Tamil", "uk": "Ukrainian",
    "zh": "Chinese",
}  # fmt: skip


def languages(pair: str) -> list[str]:
    return [LANGUAGES[code] for code in pair.split("-")]


def alma_ranked(row: dict, fits: Fits) -> list[dict | LeftOut]:
    """Reference, GPT-4 and ALMA for one or both directions of a sentence pair, scored by metrics.
    `Delta` is people's preference between GPT-4 (above 0: it is better) and ALMA.
    """
    both = row["translation"]
    one, other = both["language_pair"].split("-")
    made: list[dict | LeftOut] = []
    for source, target in ((one, other), (other, one)):
        if both.get("required_directions") not in (None, "", f"{source}-{target}"):
            continue
        names = languages(f"{source}-{target}")
        responses = [both[target], both[f"gpt4_{target}"], both[f"alma_{target}"]]
        scores = [both[f"{system}_{target}_kiwi_xcomet"] for system in ("ref", "gpt4", "alma")]
        if both.get("Delta"):
            responses, scores = responses[1:], [both["Delta"], 0.0]
        if len(set(scores)) == 1:
            made.append(LeftOut("ties"))
            continue
        prompt = f"Translate this from {names[0]} to {names[1]}:\n{names[0]}: {both[source]}"
        prompt += f"\n{names[1]}:"
        responses = [" " + response for response in responses]
        made.append({"prompt": prompt, "responses": responses, "scores": scores})
    return made


def mt_pref_pair(row: dict, fits: Fits) -> dict:
    """A source text and its languages, or Tower's prompt with chat marks, which are removed."""
    if row.get("source") is not None and row.get("lp") is not None:
        source, target = languages(row["lp"])
        prompt = f"Translate the following {source} source text to {target}:\n"
        prompt += f"{source}: {row['source']}\n{target}:"
    else:
        prompt = re.sub(r"<\|im_start\|>\w*\n?|<\|im_end\|>\n?", "", row["prompt"]).strip()
    return {"prompt": prompt, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]}


@dataclass(frozen=True)
class Source:
    """A repository on the hub with rows of one kind, and the function that formats them."""

    name: str
    kind: str
    repo: str
    format: Callable[[dict, Fits], Any]
    train: str = "train"  # the names of its splits
    test: str | None = None
    folders: tuple[str, ...] = ()  # only these are read; `name:folder` names others
    revision: str | None = None


SOURCES = (
    Source("tldr", "demonstration", "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
           tldr_demonstration, test="validation"),
    Source("tldr", "pair", "openai/summarize_from_feedback", tldr_pair, test="validation",
           folders=("comparisons",),
           revision="refs/convert/parquet"),  # the main branch has a script and no rows
    Source("ultrafeedback", "demonstration", "HuggingFaceH4/ultrafeedback_binarized",
           columns("messages"), "train_sft", "test_sft"),
    Source("ultrafeedback", "pair", "HuggingFaceH4/ultrafeedback_binarized",
           ultrafeedback_pair, "train_prefs", "test_prefs"),
    Source("ultrachat", "demonstration", "HuggingFaceH4/ultrachat_200k",
           columns("messages"), "train_sft", "test_sft"),
    Source("hh", "pair", "Anthropic/hh-rlhf", hh_pair, test="test"),
    Source("shp", "pair", "stanfordnlp/SHP", shp_pair, test="validation"),
    Source("kto-mix", "labelled", "trl-lib/kto-mix-14k",
           columns("prompt", "completion", "label"), test="test"),
    Source("alma-r", "ranked", "haoranxu/ALMA-R-Preference", alma_ranked),
    Source("mt-pref", "pair", "sardinelab/MT-pref", mt_pref_pair),
)  # fmt: skip


def problem_of(row: dict) -> LeftOut | None:
    """Why a row is left out that would be an error in a user's own file."""
    responses = [
        row[name] for name in ("chosen", "rejected", "completion", "messages") if name in row
    ]
    responses += row.get("responses", ())
    texts = [value[-1]["content"] if isinstance(value, list) else value for value in responses]
    if not all(text and text.strip() for text in texts):
        return LeftOut("with an empty answer")
    if "rejected" in row and row["chosen"] == row["rejected"]:
        return LeftOut("with equal answers")
    return None
