"""Who runs next, and what there is room for.

Lives here: priorities, the line of what waits, the memory budget, the forecast, identical work done once.
Does not live here: MLX, threads, event loops; when to ask is the engine's business, whom to refuse the api's.
"""
