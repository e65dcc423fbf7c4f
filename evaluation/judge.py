"""A language model judges pairs of answers, through any endpoint with OpenAI's chat API.

    both orders     The judge sees each pair twice, with the answers swapped. An answer wins if it
                    is preferred both times. Every other pair of verdicts is a tie: a preference
                    that the swap reverses is a preference for a position
    identical       Equal answers tie without a call
    invalid         A row with an unreadable reply has the outcome None and is counted. It is not
                    asked again: the temperature is 0

A judge also prefers longer answers and text that sounds like its own. Report both lengths and
`facts`, and use a judge from another model family than the policy's.

Failed calls are retried. Each reply is cached on disk at once: a killed run repeats no call. The
API key goes from the environment into one header. No file, message or log contains it.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from training.parallel import progress_bar, within

TEMPLATES = Path(__file__).parent / "templates"
KEYS = ("PLAINPREF_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables, in this order
WORKERS = 8  # concurrent calls
TIMEOUT, TRIES, LONGEST_WAIT = 60.0, 5, 60.0  # seconds, calls, seconds
DEADLINE, LONGEST_REPLY = 180.0, 1_000_000  # of a call: seconds, bytes
PLACEHOLDER = re.compile(r"\{(\w+)\}")
VERDICT_LINE = re.compile(r"^[ \t#*_`\-]*(?:final )?verdict[ \t*_`]*[:：](.*)$", re.I | re.M)
CHOICE = re.compile(
    r"""[\s*_`"'(\[{]*(?:(?:answer|summary|translation)\s+)?(A|B|tie)[\s*_`"')\]}.!]*""", re.I
)


def read_verdict(reply: str) -> str | None:
    """A, B or tie; None if no verdict line can be read or two of them differ."""
    if "</think>" in reply:  # verdicts among the thoughts are drafts
        reply = reply.rpartition("</think>")[2]
    elif reply.lstrip().startswith("<think>"):  # cut off while thinking
        return None
    read = {CHOICE.fullmatch(line) for line in VERDICT_LINE.findall(reply)}
    verdicts = {match and match[1].upper() for match in read}
    verdict = verdicts.pop() if len(verdicts) == 1 else None
    return "tie" if verdict == "TIE" else verdict


def load_template(name: str) -> str:
    """A file of templates/, or another file with the same placeholders ({mark} is optional)."""
    known = sorted(file.stem for file in TEMPLATES.glob("*.txt"))
    file = TEMPLATES / f"{name}.txt" if name in known else Path(name).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        choices = f"neither a UTF-8 text file nor one of {', '.join(known)}"
        raise ValueError(f"--judge-template {name}: {choices}") from None
    for needed in ("{prompt}", "{answer_a}", "{answer_b}", "Verdict:"):
        if needed not in text:
            raise ValueError(f"--judge-template {name}: it does not contain {needed}")
    return text


class Judge:
    """`cache` is a JSONL file of replies, which runs and judges can share."""

    def __init__(self, url: str, model: str, template: str, cache: Path, max_tokens: int):
        # The message does not show the URL, which may contain a secret.
        if not re.fullmatch(r"https?://[^\s@?#]+", url):
            raise ValueError(
                "--judge must be a URL such as http://localhost:8000/v1, without user, password, ? "
                f"and #: results contain it. The API key goes into {KEYS[0]} or {KEYS[1]}"
            )
        is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        # OPENAI_API_KEY may be meant for another server: it never travels unencrypted.
        names = KEYS if is_local or url.startswith("https") else KEYS[:1]
        self.key = next((key for name in names if (key := os.environ.get(name, "").strip())), "")
        if not re.fullmatch(r"[!-~]*", self.key):  # http.client's error would show it
            raise ValueError(f"{' or '.join(names)}: contains characters that no key has")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.cache, self.max_tokens = model, cache, max_tokens
        self.text = load_template(template)
        version = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        self.template = f"{Path(template).name} {version}"
        # Proxies as the environment says. No redirects: they would send the key along to any host.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(urllib.request.ProxyHandler({} if is_local else None))
        for handler in (urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            self.opener.add_handler(handler())
        self.stopped = threading.Event()
        self.wait = self.stopped.wait  # between tries
        self.replies: dict[str, dict] = {}  # the cache

    def compare(self, prompts: list[str], first: list[str], second: list[str]) -> dict[str, Any]:
        """`outcomes`: 1.0 if the first answer won, 0.5 tie, 0.0 lost, None invalid; and `facts`."""
        rows: list[list[str]] = []  # the keys of both orders; none for identical answers
        calls: dict[str, str] = {}  # key -> message; equal calls are made once
        for prompt, *pair in zip(prompts, first, second, strict=True):
            a, b = (answer.strip() for answer in pair)
            messages = [self.message(prompt, a, b), self.message(prompt, b, a)] if a != b else []
            rows.append([self.key_of(message) for message in messages])
            calls |= zip(rows[-1], messages, strict=True)
        self.read_cache()
        self.ask_all({key: text for key, text in calls.items() if key not in self.replies})
        verdicts = {key: read_verdict(self.replies[key]["reply"]) for key in calls}
        outcomes: list[float | None] = []
        readable: list[tuple] = []  # pairs of verdicts on answers that differ
        for keys in rows:
            pair = tuple(verdicts[key] for key in keys) or ("tie", "tie")
            outcome = {("A", "B"): 1.0, ("B", "A"): 0.0}.get(pair, 0.5)
            outcomes.append(None if None in pair else outcome)
            readable += [pair] if keys and None not in pair else []
        agree = [pair in (("A", "B"), ("B", "A"), ("tie", "tie")) for pair in readable]
        first_shown = [verdict == "A" for pair in readable for verdict in pair if verdict != "tie"]
        facts = {
            "judge": self.url,
            "model": self.model,
            "answered_by": sorted({self.replies[key]["model"] for key in calls} - {""}),
            "template": self.template,
            "rows": len(rows),
            "invalid": outcomes.count(None),  # rows
            "cut": sum(self.replies[key]["finish"] == "length" for key in calls),  # by max_tokens
            # Share of rows with the same verdict in both orders. Share of verdicts, ties aside, for
            # the answer that was shown first: 0.5 without a position bias.
            "consistent": sum(agree) / len(agree) if agree else None,
            "first_shown": sum(first_shown) / len(first_shown) if first_shown else None,
        }
        return {"outcomes": outcomes, "facts": facts}

    def message(self, prompt: str, a: str, b: str) -> str:
        # The mark depends on all of the material, so no answer can forge the end of its block.
        digest = hashlib.sha256(json.dumps([prompt, *sorted((a, b))]).encode()).hexdigest()
        values = {"prompt": prompt.strip(), "answer_a": a, "answer_b": b, "mark": digest[:12]}
        # One pass, so that braces inside the values stay text.
        return PLACEHOLDER.sub(lambda place: values.get(place[1], place[0]), self.text)

    def key_of(self, message: str) -> str:
        request = [self.url, self.model, message, self.max_tokens]
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()

    def read_cache(self) -> None:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a+", encoding="utf-8") as file:
            file.seek(0)
            for line in file:
                try:
                    row = json.loads(line)
                    self.replies[row["key"]] = {k: row[k] for k in ("reply", "finish", "model")}
                except (ValueError, LookupError, TypeError):
                    continue  # empty, or cut by a kill: asked again
            file.write("\n")  # ends a line that a kill cut

    def ask_all(self, calls: dict[str, str]) -> None:
        pool = ThreadPoolExecutor(WORKERS)
        self.stopped.clear()
        try:
            done = pool.map(self.ask, calls, calls.values())
            list(progress_bar(done, "judge", total=len(calls), unit="call"))
        finally:
            self.stopped.set()  # ends the waits of the workers
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, key: str, message: str) -> None:
        """Put the reply into the cache. End the run if no retry can help."""
        request = {"model": self.model, "messages": [{"role": "user", "content": message}]}
        body = json.dumps(request | {"temperature": 0, "max_tokens": self.max_tokens}).encode()
        pause = 0.0
        for attempt in range(TRIES):
            if attempt:
                self.wait(max(2 ** (attempt - 1), min(pause, LONGEST_WAIT)))
            if self.stopped.is_set():  # by an error of another worker, or Ctrl-C
                return
            status, text, pause = self.post(body)
            reply = self.read_reply(text) if status == 200 else None
            if status == 400 and "content_filter" in text:  # a refusal of this row only
                reply = {"reply": "", "finish": "content_filter", "model": ""}
            if reply:
                line = json.dumps({"key": key, "asked": self.model} | reply) + "\n"
                with self.cache.open("ab", buffering=0) as file:
                    file.write(line.encode())  # one write: other workers and runs append too
                self.replies[key] = reply
                return
            if status not in (0, 200, 408, 409, 425, 429) and status < 500:
                break
        self.stopped.set()
        if status == 401:  # the server's message may repeat parts of the key
            text = f"the API key is missing or refused ({KEYS[0]}; {KEYS[1]} over https only)"
        reason = {0: "no reply", 200: "not a chat completion"}.get(status, f"HTTP {status}")
        raise ValueError(
            f"--judge {self.url}: {reason}: {' '.join(self.without_key(text).split())[:300]}\n"
            f"The same command continues from the replies in {self.cache}"
        )

    def post(self, body: bytes) -> tuple[int, str, float]:
        """Return the HTTP status (0: no reply), the text, and how long the server wants a pause."""
        headers = {"Content-Type": "application/json", "User-Agent": "plainpref"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")

        def exchange() -> tuple[int, str, bytes]:
            with self.opener.open(request, timeout=TIMEOUT) as response:
                pause = response.headers.get("Retry-After") or ""
                return response.status, pause, response.read(LONGEST_REPLY + 1)

        try:
            status, pause, data = within(DEADLINE, exchange)
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error) or f"not complete after {DEADLINE:g} seconds", 0.0
        text = "over 1 MB" if len(data) > LONGEST_REPLY else data.decode(errors="replace")
        return status, text, float(pause) if pause.isdecimal() else 0.0

    def read_reply(self, text: str) -> dict[str, str] | None:
        try:
            found = json.loads(text)
            choice = found["choices"][0]
            values = (choice["message"]["content"], choice.get("finish_reason"), found.get("model"))
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        values = [self.without_key(str(value or "")) for value in values]
        return dict(zip(("reply", "finish", "model"), values, strict=True))

    def without_key(self, text: str) -> str:
        # A short key, such as "EMPTY" for a local server, is no secret and may be a common word.
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text
