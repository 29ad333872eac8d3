"""Where a video's frames come from: what a stream's headers say, how a picture is turned, DALI's decoder."""
