"""A reward model: which of two answers people prefer, as a number for each (Bradley-Terry).

    L(phi) = - E_(x, y_w, y_l) [ log sigmoid( r(x, y_w) - r(x, y_l) - m ) ]      Ouyang et al., equation 1, with m = 0
             + c E_(x, y_w, y_l) [ (r(x, y_w) + r(x, y_l))^2 ]                   Eisenstein et al.: centering

    Bradley and Terry 1952. Stiennon et al. 2020, arXiv 2009.01325. Ouyang et al. 2022, arXiv 2203.02155.
    Huang et al. 2024, arXiv 2403.17031 (called N+ below). Eisenstein et al. 2023, arXiv 2312.09244 (centering).

A comparison is modelled as a random draw: y_w wins with probability sigmoid(r_w - r_l), and training maximises the likelihood of
all comparisons. The model is the fine-tuned language model with a single number as its output, read at the last token of an
answer. Only differences of r between answers to a prompt are learned. The level is arbitrary; it is set after training.

    paper                    here
    x, (y_w, y_l)            a row: the prompt and its answers, best first; every pair of answers whose scores differ
    r(x, y)                  scores, (B, K): the head at an answer's last token, minus score_bias
    m, c                     margin, center_weight
    E                        mean over a prompt's pairs, then over the prompts of a step, on all processes

Departures
1. A ranked list of K answers gives all its pairs, K (K - 1) / 2 minus the ties, in one row. Their loss is averaged before the
   mean over prompts, as in InstructGPT, where pairs in different steps made the model overfit. All K answers share one copy of
   the prompt.
2. The head starts as in N+, normal with standard deviation 1 / sqrt(hidden size + 1), but has no bias, because Transformers' class
   has none: score_bias is in config.json.
3. The level: in N+ demonstrations score 0 on average. Here it is answers that the starting model samples, at temperature 1, to
   --zero-on prompts (if --model is a reward model: the rows' own answers), so that PPO starts at 0. --zero-on 0 sets no level.
4. An answer that was cut has no end-of-sequence token. It is scored at its last token like any other.

Healthy: the loss starts near ln 2 = 0.693 (higher if the fresh head's scores differ much) and falls. Held-out accuracy rises above
0.5, towards the agreement between people: 0.62 to 0.69 is published for TL;DR (1B to 6.9B), 0.7 to 0.8 elsewhere. `tiny` learns to
tell right answers from wrong ones (0.74), but not which of its own answers is better (`--dataset family`: 0.52 of a possible 0.76).
Training accuracy far above held-out accuracy is overfitting: one epoch is usual.

    python reward_model.py                                                  # the embedded task, on a laptop
    torchrun --nproc_per_node=4 reward_model.py --model runs/sft-gemma-2-2b   # after sft.py --model gemma-2-2b
    python reward_model.py --model runs/sft-... --dataset rows.jsonl        # {"prompt", "chosen", "rejected"}
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common
from sampling import score_model


@dataclass
class Args(common.Args):  # defaults: N+ (Huang et al. 2024) on TL;DR; other flags: common.Args
    margin: float = 0.0  # required difference between the scores of a pair, 0 or more
    center_weight: float = 0.0  # weight of the squared sum of a pair's scores; published: 0.01
    zero_on: int = 512  # prompts whose sampled answers score 0 on average; 0: set no level
    dataset: str | None = "tldr"  # a short name, a file, a folder, or a hub id
    max_length: int = 638  # tokens of prompt and response together
    max_prompt_length: int = 512  # tokens kept of the prompt if the row is too long
    lr: float = 3e-6  # peak learning rate
    batch_size: int = 64  # rows per optimizer step, over all processes
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up
    warmup_ratio: float = 0.0  # share of the steps during which the learning rate rises
    weight_decay: float = 0.01  # on matrices only (theirs: AdamW's default, on all weights)
    adam_eps: float = 1e-5  # AdamW's epsilon
    max_grad_norm: float = 0.0  # they do not clip


PRESETS = {  # what differs from the defaults, by model
    "tiny": dict(  # tuned here
        lr=5e-4, batch_size=16, micro_batch_size=16, warmup_ratio=0.05, weight_decay=0.0,
        adam_eps=1e-8, max_grad_norm=1.0, max_length=176, max_prompt_length=160,
        dataset="family:off-policy",  # right and wrong answers; of its own answers it learns nothing
    ),
    "pythia-1b": dict(),  # N+
}  # fmt: skip


def reward_model_loss(
    scores: torch.Tensor,  # (B, K) r(x, y) of every answer
    preferences: torch.Tensor,  # (B, K) what orders them, higher is better; NaN: no such answer
    margin: float = 0.0,
    center_weight: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """Return one loss per prompt, the mean over its pairs, and metrics: (values, weights of a mean)."""
    # (B, K, K): whether answer i is preferred to answer j. A comparison with NaN is false.
    pairs = preferences[:, :, None] > preferences[:, None, :]
    share = 1 / pairs.sum((1, 2), keepdim=True).clamp(min=1).to(scores.dtype)  # (B, 1, 1)
    scores = scores.masked_fill(preferences.isnan(), 0.0)
    better, worse = torch.broadcast_tensors(scores[:, :, None], scores[:, None, :])
    margins = better - worse  # (B, K, K)
    each = center_weight * (better + worse) ** 2 - F.logsigmoid(margins - margin)  # (B, K, K)
    losses = (share * pairs * each).sum((1, 2))  # (B,)
    metrics = {
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
    }
    return losses, {"loss": losses} | {name: (x * pairs, pairs) for name, x in metrics.items()}


def main(args: Args) -> None:
    if not args.adam_eps > 0:
        raise common.UserError("--adam-eps must be positive")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="ranked")
    run.plan(train)
    model = score_model.load_score_model(args, run, name="model")
    score_model.give_pad_token(model, tokenizer)
    is_reward_model = score_model.labels_of(args.model) == 1
    if not is_reward_model:  # else it continues with its own head
        std = (model.config.hidden_size + 1) ** -0.5
        score_model.fresh_head(model, std, seed=args.seed)
    model.score_bias = 0.0
    optimizer, scheduler = common.make_optimizer(model, args, run, adam_eps=args.adam_eps)
    run.restore(model, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch):  # for training and for evaluation
        scores = model(batch)  # (B, K)
        losses, metrics = reward_model_loss(scores, batch.scores, args.margin, args.center_weight)
        return losses, metrics | {"length/response": (batch.lengths, batch.lengths > 0)}

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, tokenizer=None)
        for batch in step.micro_batches:
            losses, metrics = losses_of(batch)
            (losses.sum() / step.num_rows).backward()  # num_rows: over all processes
            run.record(metrics)
        common.sum_gradients(model)  # a sum, not a mean: the loss is already divided
        grad_norm = common.clip_gradients(model, args.max_grad_norm)
        if grad_norm.isfinite():  # the same on every process
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.end_step(grad_norm)  # logs; saves when it is due
    run.evaluate(losses_of, held_out, tokenizer=None)
    rows, measured = train[: args.zero_on], {}
    if not is_reward_model:
        start = common.load_policy(args, run, name="start", frozen=True)
        rows = score_model.sample_rows(start, rows, tokenizer, run)
    if rows:
        model.score_bias = float(score_model.score_rows(model, rows, run).mean())
        common.say("level", f"{model.score_bias:.4f} is subtracted: such answers score 0 now")
    if not is_reward_model and args.dataset.split(":")[0] == "family":
        measured = score_model.measure_on_family(model, start, tokenizer, run)
    run.finish(model, tokenizer, measured)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
