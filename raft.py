"""RAFT: Reward rAnked FineTuning. Dong, Xiong, Goyal, Zhang, Chow, Pan, Diao, Zhang, Shum, Zhang; 2023; arXiv 2304.06767.

    stage t, for each x of b prompts:    y_1 ... y_K  ~  pi_t(y|x),  at the temperature lambda
                                         y*  =  argmax over the y_k of  r(x, y_k) - beta log pi_t(y_k|x)/pi_0(y_k|x)
    from pi_t to pi_(t+1), descent on    L  =  - (1/N) sum over the b pairs of log pi(y*|x),        N: tokens of all y*

Reinforcement learning by supervised fine-tuning: the policy writes K answers to a prompt, a reward picks the best, and SFT
makes that one likelier. Then the next prompts, with the policy as it is by then. A stage moves the policy towards its own
best of K; many stages go beyond what K samples of the first policy reach. Of the reward only which answer is best is used, so
without a KL its scale is of no account, and nothing pushes bad answers down but that good ones take their place.

    paper                    here
    x, b                     a row: a prompt, its answers are sampled; batch_size prompts are a stage, and a step of the run
    K, lambda                samples, temperature
    r                        scores: what --reward gives to the whole answer
    beta, pi_0               kl_coef, the policy before its first step; at 0, as in most of the paper, no pi_0 is loaded
    y*                       best: the place of each prompt's best answer
    N                        tokens: of the best answers of an optimizer step, on all processes

Options and departures
1. The best of each prompt, as in the paper. The default of the authors' code (github.com/OptimalScale/LMFlow) is the best fifth
   of all answers of a batch: that fills with prompts whose answers all score high, and the others are never learned from.
2. An answer that was cut for length has no end-of-sequence, and none is added: it would teach to stop in mid-sentence. It ranks
   behind all that ended, or rambling would be learned. Where no answer to a prompt has ended, the best beginning is learned as it is.
3. L is a mean over tokens, as in sft.py and in the authors' code, whose blocks have the prompts' tokens as targets too.
4. The KL moves what is ranked best, and no gradient comes from it. `tiny` needs it, for its learned reward is easily cheated:
   ranked by that alone, held-out scores rise from -0.4 to 0.9 in 10 stages, while the true reward falls from 0.31 to 0.28 (with
   the KL, 0.3 and 0.51).
5. Samples are drawn at lambda, learned at 1. A lambda below 1 sharpens the policy in every stage, whatever the reward says.
6. One optimizer and one schedule over all stages; in the authors' code each stage is a training of its own. --max-steps,
   --save-every and --eval-every count stages.

Healthy: objective/scores and objective/scores/best rise together, and the gap between them narrows (`tiny`: 0.45 in the first stage, 0.11 to
0.15 from the tenth on), as val/different falls (0.52 to 0.4): the best of K has less to choose from. objective/kl (with --kl-coef) settles
(`tiny`: 2 to 3 nats an answer from the third stage on). The reward is being cheated where objective/gold falls, val/ended falls
(to 0.8 in six stages without the KL) or val/different rises (to 0.8): read rollouts.jsonl, give a --kl-coef, or stop earlier.

    python raft.py                                                          # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 raft.py --fsdp --model runs/sft-model-gemma-2-2b --reward runs/reward_model-...   # after sft.py, reward_model.py
    python raft.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score   # {"prompt"}; score(prompts, responses) -> numbers

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import common
import generation
import scoring

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
SETTINGS = {
    "tiny": {
        "reward": "tiny-preferred@tiny", "gold_reward": "family", "samples": 16, "kl_coef": 0.1, "temperature": 1.0, "batch_epochs": 2, "minibatches": 4,
        "lr": 3e-4, "batch_size": 64, "micro_batch_size": 16, "max_steps": 20,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 176, "max_prompt_length": 160, "dataset": "family", "source": "tuned here",
    },
    "llama-7b": {  # 20 stages are those of their code's example; 64 minibatches: 32 answers an update
        "samples": 32, "kl_coef": 0.0, "temperature": 0.85, "batch_epochs": 2, "minibatches": 64,
        "lr": 2e-5, "batch_size": 2048, "micro_batch_size": 4, "max_steps": 20,
        "schedule": "linear", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 384, "max_prompt_length": 256, "dataset": "hh",
        "source": "Dong et al. 2023, section 4; stages, minibatches, length of answers and gradient norm are ours",
    },
}  # fmt: skip
EVALUATED = 256  # held-out prompts that an evaluation samples answers to
SHOWN = 4  # prompts of a stage whose best and worst answers go to rollouts.jsonl


# fmt: off
@dataclass
class Args:
    # RAFT
    reward: str | None = None  # what scores answers: a reward model's folder or hub id, two language models a@b, family (the true reward), or file.py:function; default: SETTINGS
    gold_reward: str | None = None  # another one, only measured, on held-out prompts: shows when the reward is being cheated; default: SETTINGS, else none
    samples: int | None = None  # K, answers to a prompt of which the best is learned, 2 or more; default: the model's row in SETTINGS
    kl_coef: float | None = None  # beta of the ranking, per nat: what has become likelier than it was ranks lower; 0: by reward alone; default: SETTINGS
    temperature: float | None = None  # of sampling; what is learned is learned at 1; default: SETTINGS
    batch_epochs: int | None = None  # how often the best answers of a stage are learned from; default: SETTINGS
    minibatches: int | None = None  # optimizer steps in each of these epochs; default: SETTINGS
    # Model and data
    model: str = "tiny"  # tiny, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder such as runs/sft
    dataset: str | None = None  # family, a short name (tldr, ultrafeedback, hh, ...), a file or folder (.jsonl .json .parquet .csv), a hub id[:config][:split], or name=PATH for a copy; default: SETTINGS
    eval_dataset: str | None = None  # held-out rows; default: the dataset's own test split, else a twentieth of it
    skip_bad_rows: bool = False  # go on without rows that cannot be used, instead of stopping
    max_length: int | None = None  # tokens of prompt and response together; default: SETTINGS
    max_prompt_length: int | None = None  # tokens kept of a prompt whose row is too long; default: SETTINGS
    # Optimization
    batch_size: int | None = None  # b, prompts per stage, over all processes: --samples answers are sampled to each; default: SETTINGS
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the largest that fits SETTINGS
    epochs: float | None = None  # passes over the rows; default: SETTINGS
    max_steps: int | None = None  # stages, instead of epochs; each has several optimizer steps; default: SETTINGS
    lr: float | None = None  # peak learning rate; default: SETTINGS
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] | None = None  # after the warm-up; default: SETTINGS
    warmup_ratio: float | None = None  # share of the steps in which the learning rate rises from 0; default: SETTINGS
    optimizer: Literal["adamw", "rmsprop"] | None = None  # default: SETTINGS
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float | None = None  # gradients are scaled down to this norm; 0: never; default: SETTINGS
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # to compute in; default: bfloat16 on GPUs that have it, else float32
    attn: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"  # attention; auto: sdpa, or eager where sdpa would leave something out
    fused_logps: bool = True  # log-probs through kernels/, which never hold the logits; off: the plain lines in common.py
    fsdp: bool = False  # weights, gradients and optimizer state are spread over the processes
    gradient_checkpointing: bool = False  # activations are made again in the backward pass: less memory, one more forward pass
    compile: bool = False  # torch.compile of the layers: the first steps take long, what the others gain is not measured yet
    lora_rank: int | None = None  # train adapters of this rank beside the frozen linear layers (LoRA, alpha twice the rank); 0: train all weights; default: SETTINGS, else 0
    # The run
    output_dir: str | None = None  # default: runs/<script> plus the flags that differ from their defaults
    resume: Literal["auto", "never"] = "auto"  # auto: go on where the folder's run stopped; never: a new numbered folder
    eval_every: int = 100  # steps between evaluations on held-out rows; 0: only at the start and the end
    sample_every: int = 0  # steps between greedy samples on fixed prompts; 0: only at the start and the end
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    keep_last: int = 1  # checkpoints kept
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the saved model
    cache_dir: str | None = None  # where tokens, samples and log-probs of a reference are kept for the next run; default: runs/.cache
    track: Literal["none", "wandb", "tensorboard"] = "none"  # send the metrics there too
    seed: int = 0  # of the order of rows, and of whatever is sampled
    deterministic: bool = False  # refuse operations that are not bit for bit reproducible (slower on GPUs)
# fmt: on


def best_of(
    scores: Tensor,  # (b, K) what answers are ranked by
    ended: Tensor,  # (b, K) bool: the answer has an end-of-sequence
) -> Tensor:
    """(b,) the best answer to each prompt: of those that ended, where any did; of equals the first."""
    allowed = ended | ~ended.any(1, keepdim=True)
    return scores.masked_fill(~allowed, -torch.inf).argmax(1)


def raft_loss(
    response_logps: Tensor,  # (B,) log pi(y* | x), summed over response tokens
    response_lengths: Tensor,  # (B,) how many tokens that were
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """One sum of negative log-probs per best answer, and what to plot: (values, weights) is a weighted mean."""
    losses = -response_logps  # (B,) nats an answer
    metrics = {
        "loss": (losses, response_lengths),  # nats a token
        "logps/best": response_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.reward:
        raise common.UserError(
            "--reward is needed: a reward model (reward_model.py makes one), a@b, family, or file.py:function"
        )
    for name in "temperature batch_epochs minibatches".split():
        if not 0 < getattr(args, name) < float("inf"):
            raise common.UserError(
                f"{common.flag(name)} must be positive, got {getattr(args, name)}"
            )
    if not 0 <= args.kl_coef < float("inf"):
        raise common.UserError(f"--kl-coef must be 0 or more, got {args.kl_coef}")
    if args.samples < 2:
        raise common.UserError(f"--samples must be 2 or more, got {args.samples}: one is no choice")
    scoring.check_reward(args.reward)
    if args.gold_reward:
        scoring.check_reward(args.gold_reward, "--gold-reward")
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "prompt", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
    room = args.max_length - args.max_prompt_length  # tokens of an answer
    run.plan(train, args.minibatches)

    # Two models, with --kl-coef three. One is trained: fp32 weights, gradients, optimizer state.
    asked = dict(
        attn=args.attn, share_prompt=False, fused_logps=args.fused_logps, fsdp=args.fsdp,
        compile=args.compile,
    )  # fmt: skip
    trained = asked | dict(
        gradient_checkpointing=args.gradient_checkpointing, lora_rank=args.lora_rank
    )
    policy = common.load_policy(args.model, args.dtype, run, **trained, name="policy")
    common.warn_if_not_fine_tuned(policy, tokenizer)
    ref, as_reference = None, nullcontext  # pi_0, and what it is asked in
    if args.kl_coef and args.lora_rank:
        common.say("reference", "the policy without its adapters")
        ref, as_reference = policy, lambda: common.beside("adapters").off(policy)
    elif args.kl_coef:
        ref = scoring.freeze(
            common.load_policy(args.model, args.dtype, run, **asked, name="reference")
        )
    reward = scoring.load_reward(args.reward, tokenizer, run, args.dtype, args.attn, args.fsdp)
    gold = args.gold_reward and scoring.load_reward(
        args.gold_reward, tokenizer, run, args.dtype, args.attn, args.fsdp, "gold"
    )
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)
    kept = run.kept  # what a resumed run goes on with
    used = {args.model} | ({args.reward} - {"family"} if ".py:" not in args.reward else set())
    contents = common.from_main(lambda: {name: scoring.contents_of(name) for name in used})
    changed = [
        name
        for name, files in kept.setdefault("models", contents).items()
        if files != contents[name]
    ]
    if changed:
        raise common.UserError(
            f"{run.folder} holds another run: {' and '.join(sorted(changed))} changed since. "
            "--resume never starts a new folder beside it"
        )

    def sampled(prompts: list[np.ndarray], seed: int, samples: int) -> tuple[common.Rows, dict]:
        """Answers to every prompt, one prompt's after another's, and (N,) what is known of each."""
        answers = generation.generate(
            policy, prompts, tokenizer.stop_ids, room, args.temperature, seed, run, samples=samples
        )
        pairs = zip((x for x in prompts for _ in range(samples)), answers, strict=True)
        rows = common.Rows("sampled", [common.Row(x, [y], x) for x, y in pairs])
        known = {
            "objective/scores": reward([row.prompt for row in rows.rows], answers),
            "length/response": torch.tensor([float(len(y)) for y in answers]),
            # One that was cut at the room for an answer has no end, and will not get one.
            "val/ended": torch.tensor([float(int(y[-1]) in tokenizer.stop_ids) for y in answers]),
        }
        if ref is not None:
            known["objective/kl"] = log_ratios(rows)
        return rows, known

    @torch.no_grad()
    def log_ratios(rows: common.Rows) -> Tensor:
        """(N,) log pi_t(y|x)/pi_0(y|x), of whole answers."""
        found = torch.zeros(len(rows), dtype=torch.float64)
        micros = run.deal([row.length() for row in rows.rows], list(range(len(rows))))
        for part, mine in run.share(micros, "log-probs"):
            micro = common.collate(rows, part, run.device)
            logps = common.response_logps(policy, micro)[0][:, 0]  # (B,)
            with as_reference():
                ref_logps = common.response_logps(ref, micro)[0][:, 0]
            if mine:
                found[part] = (logps.double() - ref_logps.double()).cpu()
        return common.over_processes(found)

    def evaluate() -> None:
        if len(held_out) and run.held_out_due:
            questions = [row.prompt for row in held_out.rows[:EVALUATED]]
            rows, known = sampled(questions, common.hash_of(args.seed, -1), 1)
            told = {name: float(x.mean()) for name, x in known.items()}
            if gold:
                answers = [row.responses[0] for row in rows.rows]
                told["objective/gold"] = float(gold(questions, answers).mean())
            run.tell_held_out(told)
        run.sample(held_out, policy, tokenizer)

    for batch in run.batches(train):  # a stage each, from where the run stands
        if run.evaluation_due:
            evaluate()

        # 1. Sample K answers to every prompt of the stage with the policy as it is now, score them.
        prompts = [train.rows[i].prompt for i in sorted(batch.rows)]
        everything, known = sampled(prompts, common.hash_of(args.seed, batch.step), args.samples)

        # 2. Keep the best one of each prompt.
        ranked_by = known["objective/scores"]  # (b * K,)
        if ref is not None:
            ranked_by = ranked_by - args.kl_coef * known["objective/kl"]
        ended = known["val/ended"] > 0
        best = best_of(ranked_by.view(-1, args.samples), ended.view(-1, args.samples))  # (b,)
        places = (torch.arange(len(prompts)) * args.samples + best).tolist()
        rows = common.Rows("best", [everything.rows[i] for i in places])
        known |= {f"{name}/best": x[places] for name, x in known.items()}
        texts = [row.responses[0].tobytes() for row in everything.rows]
        groups = [texts[i : i + args.samples] for i in range(0, len(texts), args.samples)]
        known["val/different"] = torch.tensor([len({*own}) / args.samples for own in groups])
        run.add(known)
        show_stage(run, everything, known, best, tokenizer)

        # 3. Fine-tune on them.
        lengths = [row.length() for row in rows.rows]
        for epoch in range(args.batch_epochs):
            order = np.random.default_rng([args.seed, batch.step, epoch]).permutation(len(rows))
            for at, part in enumerate(np.split(order, args.minibatches)):
                micros = run.deal(lengths, part.tolist())
                tokens = sum(len(rows.rows[i].responses[0]) for i in part)  # over all processes
                for indexes in micros[run.rank :: run.world]:
                    micro = run.count(common.collate(rows, indexes, run.device))
                    logps, counts = common.response_logps(policy, micro)  # (B, 1), (B, 1)
                    losses, metrics = raft_loss(logps[:, 0], counts[:, 0])
                    (losses.sum() / tokens).backward()
                    run.add(metrics)
                last = epoch == args.batch_epochs - 1 and at == args.minibatches - 1
                run.update(policy, optimizer, last)
    evaluate()
    run.finish(policy, tokenizer)


def show_stage(
    run: common.Run, everything: common.Rows, known: dict, best: Tensor, tokenizer
) -> None:
    """A line a stage, and to rollouts.jsonl the best and the worst answer to a few of its prompts."""
    groups = known["objective/scores"].view(len(best), -1)  # (b, K)
    means = {name: float(x.mean()) for name, x in known.items()}
    run.print(
        f"stage {run.step + 1}: {groups.numel():,} answers to {len(best)} prompts, mean score "
        f"{means['objective/scores']:.3f}, of the best ones {means['objective/scores/best']:.3f}; "
        f"{means['val/different']:.0%} different, {1 - means['val/ended']:.1%} without an end"
    )
    records = []
    for i, own in enumerate(groups[:SHOWN]):
        record = {"step": run.step + 1}
        for name, k in (("best", int(best[i])), ("worst", int(own.argmin()))):
            row = everything.rows[i * len(own) + k]
            record |= {"prompt": tokenizer.decode(row.prompt)}
            record |= {name: generation.text_of(row.responses[0], tokenizer)}
            record |= {f"{name}_score": float(own[k])}
        records.append(record)
    run.append("rollouts.jsonl", records)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
