"""Commands for a person: why a video is not the one that the trainer showed. No part of the worker imports them."""
