"""Messages to token ids and patches, and token ids back to text, reasoning and tool calls."""
