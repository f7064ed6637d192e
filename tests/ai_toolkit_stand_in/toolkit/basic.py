import gc


def flush(garbage_collect=True):
    if garbage_collect:
        gc.collect()
