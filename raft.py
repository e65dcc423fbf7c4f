"""RAFT: Reward rAnked FineTuning. Dong, Xiong, Goyal, Zhang, Chow, Pan, Diao, Zhang, Shum, Zhang;
2023; arXiv 2304.06767.

    stage t, for each x of b prompts:    y_1 ... y_K  ~  pi_t(y|x),  at the temperature lambda
                                         y*  =  argmax over the y_k of  r(x, y_k) - beta log pi_t(y_k|x)/pi_0(y_k|x)
    from pi_t to pi_(t+1), descent on    L  =  - (1/N) sum over the b pairs of log pi(y*|x),       N: tokens of all y*

Reinforcement learning by supervised fine-tuning: the policy writes K responses to a prompt, a reward
picks the best one, and SFT makes that one more likely. Then come the next prompts, with the new
policy. A stage moves the policy towards its own best of K; many stages go beyond what K samples
of the first policy reach. Only which response is best matters, so without a KL the scale of the
reward is irrelevant, and nothing pushes bad responses down except good ones taking their place.

    paper                    here
    x, b                     a row: a prompt to sample responses to; batch_size prompts are a stage and a step
    K, lambda                samples, temperature
    r                        scores: what --reward gives to a whole response
    beta, pi_0               kl_coef, the initial policy; with 0, as in most of the paper, no pi_0 is loaded
    y*                       best: the number of each prompt's best response
    N                        num_tokens: of the best responses of an optimizer update, over all processes

Departures
1. The best response of each prompt, as in the paper. The default of the authors' code
   (github.com/OptimalScale/LMFlow) is the best fifth of all responses of a batch. These come mostly
   from prompts whose responses all score high, so the other prompts teach little.
2. A response that was cut for length has no end-of-sequence, and none is added: that would teach
   stopping in mid-sentence. It ranks behind all that ended, or rambling would be learned. If no
   response to a prompt ended, the best beginning is learned as it is.
3. L is a mean over tokens, as in sft.py and in the authors' code, whose blocks train on prompts too.
4. The KL changes the ranking and has no gradient. `tiny` needs it, because its learned reward is
   easily cheated: without the KL, held-out scores rise from -0.4 to 0.9 in 10 stages while the true
   reward falls from 0.31 to 0.28 (with the KL: 0.3 and 0.51).
5. Samples are drawn at temperature lambda and learned at 1. A lambda below 1 sharpens the policy in
   every stage, whatever the reward says.
6. One optimizer and one schedule over all stages; in the authors' code each stage is a training run.
   --max-steps, --save-every and --eval-every count stages.

Healthy: objective/scores and objective/scores/best rise together and the gap between them narrows
(`tiny`: 0.45 in the first stage, 0.11 to 0.15 from the tenth on) as val/different falls (0.52 to
0.4): the best of K has less to choose from. objective/kl (with --kl-coef) settles (`tiny`: 2 to 3
nats a response from the third stage on). The reward is being cheated if objective/gold falls,
val/ended falls (to 0.8 in six stages without the KL) or val/different rises (to 0.8): read
rollouts.jsonl, set --kl-coef, or stop earlier.

    python raft.py                         # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 raft.py --fsdp --model runs/sft-gemma-2-2b --reward runs/reward_model-...
    python raft.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score   # {"prompt"}; score(prompts, responses) -> numbers

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass

import torch

import common
from sampling.generate import text_of
from sampling.rollouts import SHOWN, Online, Rollout, check_args, nothing_to_learn


@dataclass
class Args(common.Args):
    reward: str | None = None  # a reward model, a@b (log-ratio of two), family, or file.py:function
    gold_reward: str | None = None  # another, only measured on held-out prompts; none: off
    samples: int = 32  # K, responses to a prompt, of which the best is learned
    kl_coef: float = 0.0  # beta of the ranking, per nat; 0: by reward alone
    temperature: float = 0.85  # of sampling; what is learned is learned at 1
    sample_batch_size: int | None = None  # answers sampled at once; default: what memory allows
    batch_epochs: int = 2  # passes over the best responses of a stage
    minibatches: int = 64  # optimizer updates in each of these passes
    dataset: str | None = "hh"  # family, a short name, a file, a folder, or a hub id
    batch_size: int = 2048  # b, prompts per stage, over all processes
    micro_batch_size: int = 4  # responses per forward pass and process
    max_steps: int | None = 20  # stages
    lr: float = 2e-5  # peak learning rate
    warmup_ratio: float = 0.0  # share of the steps during which the learning rate rises
    max_length: int = 384  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens kept of the prompt; the others are the response's


PRESETS = {
    "tiny": dict(  # tuned here
        dataset="family", reward="tiny-preferred@tiny", gold_reward="family", samples=16,
        kl_coef=0.1, temperature=1.0, minibatches=4, lr=3e-4, warmup_ratio=0.05, batch_size=64,
        micro_batch_size=16, max_length=176, max_prompt_length=160,
    ),
    # The defaults: Dong et al. 2023, section 4, from memory. 20 stages are those of their code's
    # example. Minibatches (32 responses an update), length and gradient norm are ours.
    "llama-7b": dict(),
}  # fmt: skip


def best_of(
    scores: torch.Tensor,  # (b, K) what responses are ranked by
    ended: torch.Tensor,  # (b, K) bool: the response has an end-of-sequence token
) -> torch.Tensor:
    """(b,) the best response to each prompt, among those that ended if any did; the first of equals."""
    allowed = ended | ~ended.any(1, keepdim=True)
    return scores.masked_fill(~allowed, -torch.inf).argmax(1)


def raft_loss(
    response_logps: torch.Tensor,  # (B,) log pi(y* | x), summed over response tokens
    response_lengths: torch.Tensor,  # (B,) how many tokens that were
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """One sum of negative log-probs per best response, and metrics; (values, weights) is a weighted mean."""
    losses = -response_logps  # (B,) nats a response
    metrics = {
        "loss": (losses, response_lengths),  # nats a token
        "logps/best": response_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    check_args(args, positive="temperature batch_epochs minibatches")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="prompt")
    run.plan(train, args.minibatches)
    online = Online(args, run, tokenizer, with_reference=args.kl_coef > 0)
    policy = online.policy
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def roll_out(prompts: list, samples: int, step: int) -> Rollout:
        # 1. Sample K responses to each prompt with the policy as it is now, and score them.
        rollout = online.sample(prompts, samples, step)
        rollout.scores = online.reward(rollout.prompts, rollout.responses)
        return rollout

    def metrics_of(rollout: Rollout) -> dict[str, torch.Tensor]:
        metrics = rollout.metrics()
        if online.reference is not None:
            logps, ref_logps = online.logps(rollout, temperature=1.0)
            metrics["objective/kl"] = (logps - ref_logps).sum(1)  # (N,)
        return metrics

    for step in run.steps(train):  # a stage each; continues from the last checkpoint
        if run.evaluation_due:
            online.evaluate(held_out, roll_out, metrics_of)
        prompts = [train[i].prompt for i in sorted(step.rows)]
        rollout = roll_out(prompts, args.samples, run.step)
        metrics = metrics_of(rollout)  # (b * K,) each

        # 2. Keep the best one of each prompt.
        ranked_by = rollout.scores
        if online.reference is not None:
            ranked_by = ranked_by - args.kl_coef * metrics["objective/kl"]
        best = best_of(*(x.view(-1, args.samples) for x in (ranked_by, rollout.ended)))  # (b,)
        chosen = (torch.arange(len(prompts)) * args.samples + best).tolist()
        rows = [rollout.rows[i] for i in chosen]
        metrics |= {f"{name}/best": x[chosen] for name, x in metrics.items()}
        groups = [
            {y.tobytes() for y in rollout.responses[i : i + args.samples]}
            for i in range(0, len(rollout.responses), args.samples)
        ]
        metrics["val/different"] = torch.tensor([len(group) / args.samples for group in groups])
        run.record(metrics)
        show_stage(run, rollout, metrics, best, tokenizer)
        online.warn(nothing_to_learn(rollout, args))

        # 3. Fine-tune on them.
        best_only = Rollout(rows, rollout.mask[chosen], rollout.ended[chosen])
        for micro_batches in online.minibatches(best_only, args.batch_epochs):
            num_tokens = sum(int(best_only.mask[part].sum()) for part in micro_batches)
            for indexes in micro_batches[run.rank :: run.world]:
                batch = online.collate(rows, indexes)
                logps = common.response_logps(policy, batch)  # (B, 1)
                losses, metrics = raft_loss(logps[:, 0], batch.lengths[:, 0])
                (losses.sum() / num_tokens).backward()
                run.record(metrics)
            common.sum_gradients(policy)  # a sum, not a mean: the loss is already divided
            grad_norm = common.clip_gradients(policy, args.max_grad_norm)
            if grad_norm.isfinite():  # equal on all processes
                optimizer.step()
            else:
                run.saw_nonfinite = True  # one update of the step is skipped
            optimizer.zero_grad()
        scheduler.step()
        run.end_step(grad_norm)
    online.evaluate(held_out, roll_out, metrics_of)
    run.finish(policy, tokenizer)


def show_stage(
    run: common.Run, rollout: Rollout, metrics: dict, best: torch.Tensor, tokenizer
) -> None:
    """Print a line per stage. Append the best and the worst response to a few prompts to rollouts.jsonl."""
    groups = rollout.scores.view(len(best), -1)  # (b, K)
    means = {name: float(x.mean()) for name, x in metrics.items()}
    run.print(
        f"stage {run.step + 1}: {groups.numel():,} responses to {len(best)} prompts, mean score "
        f"{means['objective/scores']:.3f}, of the best ones {means['objective/scores/best']:.3f}; "
        f"{means['val/different']:.0%} different, {1 - means['val/ended']:.1%} without an end"
    )
    records = []
    for i, scores in enumerate(groups[:SHOWN]):
        record = {
            "step": run.step + 1,
            "prompt": tokenizer.decode(rollout.prompts[i * len(scores)]),
        }
        for name, k in (("best", int(best[i])), ("worst", int(scores.argmin()))):
            response = rollout.responses[i * len(scores) + k]
            record |= {name: text_of(response, tokenizer)}
            record |= {f"{name}_score": float(scores[k])}
        records.append(record)
    run.append("rollouts.jsonl", records)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
