"""An HTTP server with OpenAI's interface: requests, the queue before the batch, responses, limits."""
