import os
import sys

from client.cli import main

try:
    try:
        status = main()
    finally:
        sys.stdout.flush()
except BrokenPipeError:  # the reader closed the pipe, as in `python -m client models | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more at its end
    status = 141  # 128 + SIGPIPE, as a shell reports it
sys.exit(status)
