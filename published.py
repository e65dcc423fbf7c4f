"""Published data sets: where each is, and how a row as published becomes a row of ours.

A function for each source. It takes the published row and `fits` (is this text short enough for a
prompt?) and returns a row with the columns of common.KINDS, a list of rows, or a LeftOut with the
reason. What a paper or its code leaves out is left out here, and counted; nothing else is changed.

Prompts of the sets that were published as plain text end with a colon, and the answers begin with
the space after it, so that a prompt's last token is the same whether or not an answer follows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import BadRow, LeftOut

Fits = Callable[[str], bool]


@dataclass(frozen=True)
class Source:
    """Rows of one kind: a repository on the hub, and the function that formats its rows."""

    repo: str
    format: Callable[[dict, Fits], Any]
    columns: str  # that a row must have; `|` between alternatives
    splits: tuple[str, str | None] = ("train", None)  # to train on, held out
    folders: tuple[str, ...] = ()  # of the repository: all are read, `name:folder` reads one
    folder: str | None = None  # the only one that is read
    revision: str | None = None


# --------------------------------------------------------------------------------------------------
# Summaries of Reddit posts


def tldr_demonstration(row: dict, fits: Fits) -> dict:
    """vwxyzjn/summarize_from_feedback_tldr_3_filtered: subreddit, title, post, summary (which has
    no leading space).
    """
    return {"prompt": tldr_prompt(row, fits), "completion": " " + row["summary"]}


def tldr_pair(row: dict, fits: Fits) -> dict | LeftOut:
    """openai/summarize_from_feedback, comparisons: info (subreddit, title, post), two summaries
    (text, with its leading space), choice (the index of the better one), batch.
    """
    # Held-out batches about news articles stand among those about posts, in another format.
    if "cnndm" in (row.get("batch") or "") or row["info"].get("post") is None:
        return LeftOut("about CNN/DM articles")
    if row["choice"] not in (0, 1) or isinstance(row["choice"], bool):
        raise BadRow(f"'choice' must be 0 or 1, this is {row['choice']!r}")
    better, worse = row["summaries"][row["choice"]], row["summaries"][1 - row["choice"]]
    prompt = tldr_prompt(row["info"], fits)
    return {"prompt": prompt, "chosen": better["text"], "rejected": worse["text"]}


def tldr_prompt(info: dict, fits: Fits) -> str:
    """A post that is too long loses whole lines at its end, as published, so that the question
    stays; a single line loses letters.
    """

    def prompt(post: str) -> str:
        return (
            f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {post}\n\nTL;DR:"
        )

    post = info["post"]
    while not fits(prompt(post)):
        if "\n" not in post:
            return prompt(post[: _most_letters(post, lambda part: fits(prompt(part)))])
        post = post[: post.rindex("\n")]
    return prompt(post)


def _most_letters(text: str, fits: Fits) -> int:
    """How many of its letters fit, where not all do. The published code takes them away one by one;
    halving finds the same number, but for texts that lose a letter and gain a token.
    """
    fit, too_many = 0, len(text)
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        fit, too_many = (middle, too_many) if fits(text[:middle]) else (fit, middle)
    return fit


# --------------------------------------------------------------------------------------------------
# Chat


def ultrafeedback_pair(row: dict, fits: Fits) -> dict | LeftOut:
    """HuggingFaceH4/ultrafeedback_binarized, *_prefs: chosen, rejected (whole dialogues as
    messages), score_chosen, score_rejected.
    """
    if row["score_chosen"] == row["score_rejected"]:
        return LeftOut("ties")
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def dialogue(row: dict, fits: Fits) -> dict:
    """HuggingFaceH4/ultrachat_200k and the *_sft splits of HuggingFaceH4/ultrafeedback_binarized:
    messages.
    """
    return {"messages": row["messages"]}


def hh_pair(row: dict, fits: Fits) -> dict | LeftOut:
    """Anthropic/hh-rlhf: chosen, rejected (whole dialogues as text, turns marked with "Human:" and
    "Assistant:"). They stay texts, as in the DPO paper's code, so that any tokenizer will do.
    """
    prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
    other, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
    if not mark or prompt != other:
        return LeftOut("with different dialogues before the answer")
    return {"prompt": prompt + mark, "chosen": chosen, "rejected": rejected}


def shp_pair(row: dict, fits: Fits) -> dict | LeftOut:
    """stanfordnlp/SHP: history (the post), human_ref_A, human_ref_B (comments), score_A, score_B
    (their votes), labels (1: A is better, 0: B).
    """
    votes = sorted((row["score_A"], row["score_B"]))
    if votes[1] < 2 * votes[0]:  # the DPO paper's filter, and in its format
        return LeftOut("with less than twice the votes")
    if row["labels"] not in (0, 1):
        raise BadRow(f"'labels' must be 0 or 1, this is {row['labels']!r}")
    better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
    return {
        "prompt": f"\n\nHuman: {row['history']}\n\nAssistant:",
        "chosen": " " + row[f"human_ref_{better}"],
        "rejected": " " + row[f"human_ref_{worse}"],
    }


def kto_mix(row: dict, fits: Fits) -> dict:
    """trl-lib/kto-mix-14k: prompt, completion (messages), label (true: desirable)."""
    return {name: row[name] for name in ("prompt", "completion", "label")}


# --------------------------------------------------------------------------------------------------
# Translation

LANGUAGES = {
    "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "ta": "Tamil", "uk": "Ukrainian",
    "zh": "Chinese",
}  # fmt: skip


def _languages(pair: str) -> tuple[str, str]:
    try:
        source, target = (LANGUAGES[code] for code in pair.split("-"))
    except (KeyError, ValueError):
        raise BadRow(f"{pair!r} is no pair of {', '.join(LANGUAGES)}") from None
    return source, target


def alma_ranked(row: dict, fits: Fits) -> list[dict | LeftOut]:
    """haoranxu/ALMA-R-Preference: translation, a dict of language_pair ("de-en"), en, de (each
    other's reference), gpt4_de, alma_de, gpt4_en, alma_en, their scores ref_de_kiwi_xcomet, ...,
    required_directions (one of the two, or empty) and Delta.
    """
    both = row["translation"]
    one, other = both["language_pair"].split("-")
    made: list[dict | LeftOut] = []
    for source, target in ((one, other), (other, one)):
        if both.get("required_directions") not in (None, "", f"{source}-{target}"):
            continue
        names = _languages(f"{source}-{target}")
        responses = [both[target], both[f"gpt4_{target}"], both[f"alma_{target}"]]
        scores = [both[f"{system}_{target}_kiwi_xcomet"] for system in ("ref", "gpt4", "alma")]
        if both.get("Delta"):  # people compared GPT-4 (above 0: it is better) with ALMA
            responses, scores = responses[1:], [both["Delta"], 0.0]
        if len(set(scores)) == 1:
            made.append(LeftOut("ties"))
            continue
        prompt = f"Translate this from {names[0]} to {names[1]}:\n{names[0]}: {both[source]}"
        made.append(
            {
                "prompt": f"{prompt}\n{names[1]}:",
                "responses": [" " + response for response in responses],
                "scores": scores,
            }
        )
    return made


CHAT_MARKS = re.compile(r"<\|im_start\|>\w*\n?|<\|im_end\|>\n?")


def mt_pref_pair(row: dict, fits: Fits) -> dict:
    """sardinelab/MT-pref: chosen, rejected, and either source (a text) and lp ("en-de"), or prompt
    with Tower's chat marks around it. Both give the words of Tower's prompt, without the marks.
    """
    if row.get("source") is not None and row.get("lp") is not None:
        source, target = _languages(row["lp"])
        prompt = (
            f"Translate the following {source} source text to {target}:\n"
            f"{source}: {row['source']}\n{target}:"
        )
    else:
        prompt = CHAT_MARKS.sub("", row["prompt"]).strip()
    return {"prompt": prompt, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]}


# --------------------------------------------------------------------------------------------------
# The short names

DATASETS: dict[str, dict[str, Source]] = {
    "tldr": {
        "demonstration": Source(
            "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
            tldr_demonstration,
            "subreddit title post summary",
            ("train", "validation"),
        ),
        "pair": Source(
            "openai/summarize_from_feedback",
            tldr_pair,
            "info summaries choice",
            ("train", "validation"),
            folder="comparisons",
            # The main branch holds a script that downloads the rows from elsewhere; this one has
            # the rows, as the hub converted them.
            revision="refs/convert/parquet",
        ),
    },
    "ultrafeedback": {
        "demonstration": Source(
            "HuggingFaceH4/ultrafeedback_binarized",
            dialogue,
            "messages",
            ("train_sft", "test_sft"),
        ),
        "pair": Source(
            "HuggingFaceH4/ultrafeedback_binarized",
            ultrafeedback_pair,
            "chosen rejected score_chosen score_rejected",
            ("train_prefs", "test_prefs"),
        ),
    },
    "ultrachat": {
        "demonstration": Source(
            "HuggingFaceH4/ultrachat_200k", dialogue, "messages", ("train_sft", "test_sft")
        )
    },
    "hh": {
        "pair": Source(
            "Anthropic/hh-rlhf",
            hh_pair,
            "chosen rejected",
            ("train", "test"),
            folders=(
                "harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"
            ),
        )
    },
    "shp": {
        "pair": Source(
            "stanfordnlp/SHP",
            shp_pair,
            "history human_ref_A human_ref_B labels score_A score_B",
            ("train", "validation"),
            folders=tuple(
                """askacademia askanthropology askbaking askcarguys askculinary askdocs askengineers
                askhistorians askhr askphilosophy askphysics askscience asksciencefiction
                asksocialscience askvet changemyview explainlikeimfive legaladvice""".split()
            ),
        )
    },
    "kto-mix": {
        "labelled": Source(
            "trl-lib/kto-mix-14k", kto_mix, "prompt completion label", ("train", "test")
        )
    },
    "alma-r": {
        "ranked": Source(
            "haoranxu/ALMA-R-Preference",
            alma_ranked,
            "translation",
            folders=("cs-en", "de-en", "is-en", "ru-en", "zh-en"),
        )
    },
    "mt-pref": {
        "pair": Source(
            "sardinelab/MT-pref",
            mt_pref_pair,
            "chosen rejected source lp | chosen rejected prompt",
        )
    },
}  # fmt: skip


def blemish(row: dict) -> LeftOut | None:
    """Why a well-formed row of a published set is of no use. (In a file of your own it would be a
    mistake that you can mend; here it is left out.)
    """
    alone = [row[name] for name in ("chosen", "rejected", "completion", "messages") if name in row]
    answers = [*alone, *row.get("responses", ())]
    said = [answer[-1]["content"] if isinstance(answer, list) else answer for answer in answers]
    if not all(text and text.strip() for text in said):
        return LeftOut("with an empty answer")
    if "rejected" in row and row["chosen"] == row["rejected"]:
        return LeftOut("with equal answers")
    return None
