"""A web page to try the worker: a form, the video, earlier runs, and the comparison with a training sample.

`python -m playground` serves it on 127.0.0.1 and calls the worker or endpoint itself, so the API key never reaches the browser.
It is for one person on one computer, and not part of the worker. See docs/playground.md.
"""
