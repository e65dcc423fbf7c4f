"""What only some runs need: FSDP, LoRA, a memory estimate, tracking and the closing report."""
