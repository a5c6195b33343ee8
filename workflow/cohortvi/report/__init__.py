"""What people look at: one self-contained page that says what was done and how far it can be trusted."""
