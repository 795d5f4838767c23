"""The command line: `app` declares the commands, one module runs each; torch is imported when one runs."""
