// SPDX-License-Identifier: Apache-2.0
// One portable binary, the widest vectors of the machine it runs on.
//
// ZF_MULTIVERSION marks a plain function that the compiler builds for AVX-512, AVX2 and the baseline; the choice is
// made once, at load time.  What it calls must be ZF_INLINE to be built along.  Not under the sanitizers, whose run
// time is not up yet when such choices are made.
#pragma once

#define ZF_INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define ZF_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ZF_MULTIVERSION
#endif
