"""From an http(s) URL to a file, safely: addresses, requests, downloads, and what counts as a refusal."""
