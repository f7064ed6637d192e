"""Commands that help to find out why a video differs from the trainer's sample. The worker does not import them."""
