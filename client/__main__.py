import os
import sys

from client.cli import main

try:
    try:
        status = main()
    finally:
        sys.stdout.flush()
except BrokenPipeError:  # who reads has seen enough, as in `python -m client models | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
    status = 141  # as a shell has it of a program that wrote into a closed pipe
sys.exit(status)
