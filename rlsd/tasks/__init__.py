"""What is asked and how an answer is judged: data, prompts, images, rewards, programs."""
