"""An OpenAI-compatible server over one engine: `create_app` (app.py) makes it, `minim3 serve` runs it.

How a request lives: limits.py, auth.py and logs.py see it first (pure ASGI, around every route); a route (chat.py,
completions.py, responses.py, ...) checks it and turns it into ids; driver.py hands it to the engine's thread and brings
the tokens back; answers.py makes them text, reasoning and tool calls; the route shapes them, whole or as a stream.
"""
