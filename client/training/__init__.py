"""What ai-toolkit leaves in a training's folder, and the requests that make its samples again: no network, no torch."""
