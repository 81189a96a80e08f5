"""Meta-learning: networks that learn to tell new classes apart from a few images of each; free of Ray.

What an episode is:

- `classes`: which classes train, which validate and which are held out; `episodes`: few-shot tasks, each a pure
  function of the seed and its number; `episode_images`: as a network takes them

What is learnt from it:

- `network`: a backbone as pure functions of its parameters; `batchnorm`: normalised with moments of the batch at hand
- `methods`: one algorithm a file, of two kinds: `Embedding` and `Adapting`; `inner_loop`: what the latter share
- `model`, `layout`: a method and its network, and their state as one vector; `gradients`: meta-gradients of episodes

The outer loop:

- `crew`: who goes through episodes, this process or several; `runner`: what each of them does
- `steps`: the gradient of a step, added up in one order; `training`: the steps, from wherever checkpoints stand
- `evaluation`, `scoring`: accuracy over episodes; `tapped`: features of a backbone that nobody trains, from taps

The job:

- `task`: everything checked; `job`: trained, measured and stored; `plan`; `artifact`: as files; `predict`: new classes;
  `remeasure`: a finished run's accuracy, on its own classes or on others
"""
