import sys

from client.cli import main
from client.closed_pipe import until_reader_leaves

sys.exit(until_reader_leaves(main))
