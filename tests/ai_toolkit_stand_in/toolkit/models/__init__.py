raise ImportError("the worker must not run the package __init__ files of a checkout")
