"""RunPod's SDK: its queue, its local API, and every private of it that the worker leans on."""
