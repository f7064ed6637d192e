"""`python -m client sweep`: one request with many LoRAs, scales and seeds, beside each other.

plan.py decides the videos, record.py remembers on disk what became of each, making.py has them made, and results.py writes the
grid, the sheet and the page. `tools.grid` draws the grid: this package needs PyAV and Pillow.
"""
