"""What a person sees: progress, tables and explanations, on a terminal or as plain lines."""
