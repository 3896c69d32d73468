// Generated from fusedopt/rules.py by `make rules`. Do not edit: change the rule there.
#pragma once

#include "functions.h"

namespace fusedopt {

// Stochastic gradient descent.
struct sgd {
  static constexpr const char* name = "sgd";
  static constexpr int states = 0, scalars = 2;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* , const T* scalar) {
    const T l2 = scalar[0];
    const T lr = scalar[1];
    p = p - lr * (g + l2 * p);
  }
};

// SGD with heavy-ball or Nesterov momentum; `gain` is 1 - dampening, and 1 on a parameter's first step.
struct sgd_momentum {
  static constexpr const char* name = "sgd_momentum";
  static constexpr int states = 1, scalars = 5;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T momentum_buffer = state[0];
    const T l2 = scalar[0];
    const T momentum = scalar[1];
    const T gain = scalar[2];
    const T lr_grad = scalar[3];
    const T lr_buffer = scalar[4];
    g = g + l2 * p;
    momentum_buffer = momentum * momentum_buffer + gain * g;
    p = p - (lr_grad * g + lr_buffer * momentum_buffer);
    state[0] = momentum_buffer;
  }
};

// Adagrad (Duchi et al., 2011).
struct adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr int states = 1, scalars = 3;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T sum = state[0];
    const T l2 = scalar[0];
    const T lr = scalar[1];
    const T eps = scalar[2];
    g = g + l2 * p;
    sum = sum + g * g;
    p = p - lr * g / (sqrt(sum) + eps);
    state[0] = sum;
  }
};

// RMSprop (Hinton, Coursera lecture 6e, 2012).
struct rmsprop {
  static constexpr const char* name = "rmsprop";
  static constexpr int states = 1, scalars = 4;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T square_avg = state[0];
    const T l2 = scalar[0];
    const T w2 = scalar[1];
    const T lr = scalar[2];
    const T eps = scalar[3];
    g = g + l2 * p;
    square_avg = square_avg + w2 * (g * g - square_avg);
    p = p - lr * g / (sqrt(square_avg) + eps);
    state[0] = square_avg;
  }
};

// RMSprop with momentum on the normalized gradient.
struct rmsprop_momentum {
  static constexpr const char* name = "rmsprop_momentum";
  static constexpr int states = 2, scalars = 5;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T square_avg = state[0];
    T momentum_buffer = state[1];
    const T l2 = scalar[0];
    const T w2 = scalar[1];
    const T momentum = scalar[2];
    const T lr = scalar[3];
    const T eps = scalar[4];
    g = g + l2 * p;
    square_avg = square_avg + w2 * (g * g - square_avg);
    momentum_buffer = momentum * momentum_buffer + g / (sqrt(square_avg) + eps);
    p = p - lr * momentum_buffer;
    state[0] = square_avg;
    state[1] = momentum_buffer;
  }
};

// RMSprop normalized by an estimate of the variance (Graves, arXiv:1308.0850).
struct rmsprop_centered {
  static constexpr const char* name = "rmsprop_centered";
  static constexpr int states = 2, scalars = 5;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T square_avg = state[0];
    T grad_avg = state[1];
    const T l2 = scalar[0];
    const T w2 = scalar[1];
    const T floor = scalar[2];
    const T lr = scalar[3];
    const T eps = scalar[4];
    g = g + l2 * p;
    square_avg = square_avg + w2 * (g * g - square_avg);
    grad_avg = grad_avg + w2 * (g - grad_avg);
    T variance = maximum(square_avg - grad_avg * grad_avg, floor * square_avg);
    p = p - lr * g / (sqrt(variance) + eps);
    state[0] = square_avg;
    state[1] = grad_avg;
  }
};

// Centered RMSprop with momentum.
struct rmsprop_centered_momentum {
  static constexpr const char* name = "rmsprop_centered_momentum";
  static constexpr int states = 3, scalars = 6;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T square_avg = state[0];
    T momentum_buffer = state[1];
    T grad_avg = state[2];
    const T l2 = scalar[0];
    const T w2 = scalar[1];
    const T floor = scalar[2];
    const T momentum = scalar[3];
    const T lr = scalar[4];
    const T eps = scalar[5];
    g = g + l2 * p;
    square_avg = square_avg + w2 * (g * g - square_avg);
    grad_avg = grad_avg + w2 * (g - grad_avg);
    T variance = maximum(square_avg - grad_avg * grad_avg, floor * square_avg);
    momentum_buffer = momentum * momentum_buffer + g / (sqrt(variance) + eps);
    p = p - lr * momentum_buffer;
    state[0] = square_avg;
    state[1] = momentum_buffer;
    state[2] = grad_avg;
  }
};

// Lion (Chen et al., arXiv:2302.06675).
struct lion {
  static constexpr const char* name = "lion";
  static constexpr int states = 1, scalars = 4;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    const T decay = scalar[0];
    const T w1 = scalar[1];
    const T w2 = scalar[2];
    const T lr = scalar[3];
    T update = exp_avg + w1 * (g - exp_avg);
    p = p * decay - lr * sign(update);
    exp_avg = exp_avg + w2 * (g - exp_avg);
    state[0] = exp_avg;
  }
};

// Adam (Kingma and Ba, arXiv:1412.6980) and AdamW (Loshchilov and Hutter, arXiv:1711.05101).
struct adam {
  static constexpr const char* name = "adam";
  static constexpr int states = 2, scalars = 6;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    T exp_avg_sq = state[1];
    const T l2 = scalar[0];
    const T decay = scalar[1];
    const T w1 = scalar[2];
    const T w2 = scalar[3];
    const T step_size = scalar[4];
    const T eps = scalar[5];
    g = g + l2 * p;
    exp_avg = exp_avg + w1 * (g - exp_avg);
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq);
    p = p * decay - step_size * exp_avg / (sqrt(exp_avg_sq) + eps);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
  }
};

// Adam and AdamW with the largest second moment so far (Reddi et al., arXiv:1904.09237).
struct amsgrad {
  static constexpr const char* name = "amsgrad";
  static constexpr int states = 3, scalars = 6;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    T exp_avg_sq = state[1];
    T max_exp_avg_sq = state[2];
    const T l2 = scalar[0];
    const T decay = scalar[1];
    const T w1 = scalar[2];
    const T w2 = scalar[3];
    const T step_size = scalar[4];
    const T eps = scalar[5];
    g = g + l2 * p;
    exp_avg = exp_avg + w1 * (g - exp_avg);
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq);
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
    p = p * decay - step_size * exp_avg / (sqrt(max_exp_avg_sq) + eps);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
    state[2] = max_exp_avg_sq;
  }
};

// Adamax, Adam with the infinity norm (Kingma and Ba, arXiv:1412.6980, section 7).
struct adamax {
  static constexpr const char* name = "adamax";
  static constexpr int states = 2, scalars = 5;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    T exp_inf = state[1];
    const T l2 = scalar[0];
    const T w1 = scalar[1];
    const T beta2 = scalar[2];
    const T step_size = scalar[3];
    const T eps = scalar[4];
    g = g + l2 * p;
    exp_avg = exp_avg + w1 * (g - exp_avg);
    exp_inf = maximum(beta2 * exp_inf, abs(g) + eps);
    p = p - step_size * exp_avg / exp_inf;
    state[0] = exp_avg;
    state[1] = exp_inf;
  }
};

// NAdam, Adam with Nesterov momentum (Dozat, 2016).
struct nadam {
  static constexpr const char* name = "nadam";
  static constexpr int states = 2, scalars = 7;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    T exp_avg_sq = state[1];
    const T l2 = scalar[0];
    const T decay = scalar[1];
    const T w1 = scalar[2];
    const T w2 = scalar[3];
    const T step_grad = scalar[4];
    const T step_avg = scalar[5];
    const T eps = scalar[6];
    g = g + l2 * p;
    exp_avg = exp_avg + w1 * (g - exp_avg);
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq);
    p = p * decay - (step_grad * g + step_avg * exp_avg) / (sqrt(exp_avg_sq) + eps);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
  }
};

// RAdam (Liu et al., arXiv:1908.03265).
struct radam {
  static constexpr const char* name = "radam";
  static constexpr int states = 2, scalars = 7;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    T exp_avg_sq = state[1];
    const T l2 = scalar[0];
    const T decay = scalar[1];
    const T w1 = scalar[2];
    const T w2 = scalar[3];
    const T step_size = scalar[4];
    const T adapt = scalar[5];
    const T eps = scalar[6];
    g = g + l2 * p;
    exp_avg = exp_avg + w1 * (g - exp_avg);
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq);
    p = p * decay - step_size * exp_avg / (adapt * sqrt(exp_avg_sq) + eps);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
  }
};

// AdEMAMix, AdamW with a second, slow average (Pagliardini et al., arXiv:2409.03137).
struct ademamix {
  static constexpr const char* name = "ademamix";
  static constexpr int states = 3, scalars = 7;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T g, T* state, const T* scalar) {
    T exp_avg = state[0];
    T exp_avg_slow = state[1];
    T exp_avg_sq = state[2];
    const T decay = scalar[0];
    const T w1 = scalar[1];
    const T w2 = scalar[2];
    const T w3 = scalar[3];
    const T step_size = scalar[4];
    const T step_slow = scalar[5];
    const T eps = scalar[6];
    exp_avg = exp_avg + w1 * (g - exp_avg);
    exp_avg_slow = exp_avg_slow + w3 * (g - exp_avg_slow);
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq);
    p = p * decay - (step_size * exp_avg + step_slow * exp_avg_slow) / (sqrt(exp_avg_sq) + eps);
    state[0] = exp_avg;
    state[1] = exp_avg_slow;
    state[2] = exp_avg_sq;
  }
};

// Muon's momentum (Jordan et al., 2024): what is to be orthogonalized; `blend` is w1 for Nesterov's, else 0.
struct muon_momentum {
  static constexpr const char* name = "muon_momentum";
  static constexpr int states = 2, scalars = 2;
  template <class T>
  FUSEDOPT_INLINE static void apply(T&, T g, T* state, const T* scalar) {
    T momentum_buffer = state[0];
    T update = state[1];
    const T w1 = scalar[0];
    const T blend = scalar[1];
    momentum_buffer = momentum_buffer + w1 * (g - momentum_buffer);
    update = momentum_buffer + blend * (g - momentum_buffer);
    state[0] = momentum_buffer;
    state[1] = update;
  }
};

// Muon's step by an orthogonalized update.
struct muon {
  static constexpr const char* name = "muon";
  static constexpr int states = 1, scalars = 2;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T, T* state, const T* scalar) {
    T update = state[0];
    const T decay = scalar[0];
    const T step_size = scalar[1];
    p = p * decay - step_size * update;
    state[0] = update;
  }
};

// Muon's step with cautious weight decay (Chen et al., arXiv:2510.12402): none where the step grows p.
struct muon_cautious {
  static constexpr const char* name = "muon_cautious";
  static constexpr int states = 1, scalars = 2;
  template <class T>
  FUSEDOPT_INLINE static void apply(T& p, T, T* state, const T* scalar) {
    T update = state[0];
    const T decay = scalar[0];
    const T step_size = scalar[1];
    p = where(update * p < T(0), p, p * decay) - step_size * update;
    state[0] = update;
  }
};

}  // namespace fusedopt

#define FUSEDOPT_RULES(X) \
  X(sgd) X(sgd_momentum) X(adagrad) X(rmsprop) X(rmsprop_momentum) X(rmsprop_centered) \
  X(rmsprop_centered_momentum) X(lion) X(adam) X(amsgrad) X(adamax) X(nadam) X(radam) X(ademamix) \
  X(muon_momentum) X(muon) X(muon_cautious)
