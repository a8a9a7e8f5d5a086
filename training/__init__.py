"""What a run needs beside its step."""
