"""A page to try the worker: a form, the video, earlier runs and the comparison with a training sample. See docs/playground.md.

`python -m playground` serves it on 127.0.0.1 and stands between the browser and the worker or endpoint: the API key stays in
this process. It is a tool for one person at one machine, and no part of the worker.
"""
