"""Teacher-student distillation for images: scale-decoupled, with standardised logits."""
