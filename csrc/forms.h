// The launchers of each op by form, for what binds them: the plain one, and that for sm_90a where it is in this build.
#pragma once

#include "launchers.h"

#ifdef DFKD_HOPPER
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

template <typename Scratch, typename Forward, typename BackwardScratch, typename Backward>
struct Launchers {
  Scratch* scratch;
  Forward* forward;
  BackwardScratch* backward_scratch;
  Backward* backward;
};

#define DFKD_LAUNCHERS(op) \
  Launchers { &op##_scratch, &op, &op##_backward_scratch, &op##_backward }
#ifdef DFKD_HOPPER
#define DFKD_FORMS(op) \
  inline auto op##_form(bool hopper) { return hopper ? DFKD_LAUNCHERS(op##_hopper) : DFKD_LAUNCHERS(op); }
#else
#define DFKD_FORMS(op) \
  inline auto op##_form(bool) { return DFKD_LAUNCHERS(op); }
#endif

DFKD_FORMS(dfkd_contrastive_loss)
DFKD_FORMS(dfkd_spatial_attention)
DFKD_FORMS(dfkd_high_order_attention)
